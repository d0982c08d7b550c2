"""Recurrent layers over whole sequences, with or without a mesh."""

import keras
import tensorflow as tf
from keras import ops

from moe_tf import checks
from moe_tf import sharding
from moe_tf.layers.recurrent import mesh_lstm
from moe_tf.layers.recurrent.projected_lstm import ProjectedLSTMCell
from moe_tf.types import Tensor


def run_rnn(
    rnn: keras.layers.RNN, x_BLD: Tensor, training: bool = False
) -> Tensor:
    """Calls an LSTM without biases, by `mesh_lstm` where there is a mesh.

    Args:
        rnn: built layer, of a `ProjectedLSTMCell` or an `LSTMCell`.
        x_BLD: float.
        training: bool.

    Returns:
        Float `(B, L, P)`.
    """
    if sharding.axes() is None:
        return rnn(x_BLD, training=training)
    kernels = (
        ops.cast(kernel, x_BLD.dtype) for kernel in rnn.cell.trainable_variables
    )
    return mesh_lstm.lstm(x_BLD, *kernels)


def reverse_sequences(x_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    """Reverses the words of each sequence and leaves the padding in place.

    Args:
        x_BLD: float.
        mask_BL: bool, `True` for words, all of them left of the padding.

    Returns:
        Float `(B, L, D)`.
    """
    position_L = ops.arange(ops.shape(mask_BL)[1])
    length_B1 = ops.sum(ops.cast(mask_BL, "int32"), axis=1, keepdims=True)
    index_BL = ops.where(mask_BL, length_B1 - 1 - position_L, position_L)

    @tf.custom_gradient
    def gather(x_BLD):  # a permutation that is its own inverse
        result = tf.gather(x_BLD, index_BL, batch_dims=1)
        return result, lambda dx_BLD: tf.gather(dx_BLD, index_BL, batch_dims=1)

    return gather(x_BLD)


@keras.saving.register_keras_serializable(package="moe_tf")
class BidirectionalLSTM(keras.layers.Layer):
    """Two projected LSTMs, one of which reads each sequence from its end.

    The output has the width of the input; each direction gives half of it.

    Args:
        units: int, memory cells of each direction.

    Call arguments:
        inputs: float `(B, L, D)`.
        mask: bool `(B, L)`, `True` for words, all left of the padding.
        training: bool.

    Returns:
        Float `(B, L, D)`; the values in padding have no meaning.

    Raises:
        ValueError: if `units` is below 1 or `D` is odd.

    Example:

    >>> layer = moe_tf.layers.BidirectionalLSTM(units=16)
    >>> y_BLD = layer(np.ones((2, 3, 8)), mask=np.ones((2, 3), bool))
    >>> tuple(y_BLD.shape)
    (2, 3, 8)
    """

    def __init__(self, units: int, **kwargs) -> None:
        super().__init__(**kwargs)
        checks.at_least("units", units, 1)
        self.units = units
        self.supports_masking = True

    def build(self, input_shape):
        width = input_shape[-1]
        if width % 2:
            raise ValueError(
                "The width of the inputs must be even: each direction gives "
                f"half. Received: input_shape={input_shape}"
            )
        self.forward, self.backward = (
            keras.layers.RNN(
                ProjectedLSTMCell(
                    self.units, width // 2, dtype=self.dtype_policy, name="cell"
                ),
                return_sequences=True,
                dtype=self.dtype_policy,
                name=name,
            )
            for name in ("forward", "backward")
        )
        for rnn in (self.forward, self.backward):
            rnn.build(input_shape)

    def call(self, inputs, mask, training=False):
        ahead_BLP = run_rnn(self.forward, inputs, training)
        back_BLP = run_rnn(
            self.backward, reverse_sequences(inputs, mask), training
        )
        return ops.concatenate(
            [ahead_BLP, reverse_sequences(back_BLP, mask)], axis=-1
        )

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "units": self.units}
