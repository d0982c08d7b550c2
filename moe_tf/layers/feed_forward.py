"""A feed-forward net without biases: a dense layer in place of experts."""

from collections.abc import Sequence

import keras

from moe_tf.types import Activation


@keras.saving.register_keras_serializable(package="moe_tf")
class FeedForward(keras.layers.Layer):
    """Hidden layers with an activation, then a linear layer to the input width.

    The replacement of the experts in the paper's baselines MoE-1-Wide (one
    hidden layer) and MoE-1-Deep (four), appendix C.

    Args:
        hidden_units: sequence of ints, widths of the hidden layers.
        activation: name or function of the hidden activation. Defaults to
            `"relu"`.

    Call arguments:
        inputs: float `(..., D)`.

    Returns:
        Float `(..., D)`.

    Raises:
        ValueError: if `hidden_units` is empty or has a width below 1.

    Reference:
     - [Shazeer et al., 2017](https://arxiv.org/abs/1701.06538)

    Example:

    >>> layer = moe_tf.layers.FeedForward([16, 16])
    >>> tuple(layer(np.ones((2, 3, 8))).shape)
    (2, 3, 8)
    >>> layer.count_params()
    512
    """

    def __init__(
        self,
        hidden_units: Sequence[int],
        activation: Activation = "relu",
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        self.hidden_units = tuple(hidden_units)
        if not self.hidden_units or min(self.hidden_units) < 1:
            raise ValueError(
                "`hidden_units` must hold at least one width, each at least "
                f"1. Received: hidden_units={hidden_units}"
            )
        self.activation = keras.activations.get(activation)
        self.supports_masking = True

    def build(self, input_shape):
        width = input_shape[-1]
        sizes = (*self.hidden_units, width)
        activations = (*[self.activation] * len(self.hidden_units), None)
        self.dense_layers = []
        for index, (size, activation) in enumerate(
            zip(sizes, activations, strict=True)
        ):
            dense = keras.layers.Dense(
                size,
                activation=activation,
                use_bias=False,
                dtype=self.dtype_policy,
                name=f"dense_{index}",
            )
            dense.build((*input_shape[:-1], width))
            self.dense_layers.append(dense)
            width = size

    def call(self, inputs):
        outputs = inputs
        for dense in self.dense_layers:
            outputs = dense(outputs)
        return outputs

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {
            **super().get_config(),
            "hidden_units": self.hidden_units,
            "activation": keras.activations.serialize(self.activation),
        }
