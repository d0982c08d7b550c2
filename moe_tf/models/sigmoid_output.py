"""The sigmoid that follows experts in the paper's LSTM models."""

import keras
from keras import ops

from moe_tf.layers.moe import SparseMoE
from moe_tf.types import Tensor


def sigmoid_output(
    layer: keras.layers.Layer, inputs: Tensor, mask: Tensor, training: bool
) -> Tensor:
    """Computes `sigmoid(layer(inputs))`, as appendix C has it.

    Args:
        layer: `SparseMoE`, or the `FeedForward` net in its place.
        inputs: float `(..., D)`.
        mask: bool `(...)`, `False` for padding, which is not routed.
        training: bool.

    Returns:
        Float `(..., D)`.
    """
    if isinstance(layer, SparseMoE):
        return ops.sigmoid(layer(inputs, mask=mask, training=training))
    return ops.sigmoid(layer(inputs))
