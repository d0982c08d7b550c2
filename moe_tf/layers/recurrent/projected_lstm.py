"""The LSTM cell with a recurrent projection layer.

Letters: `I` input width, `H` memory cells, `P` projected width, `G` the four
gates of all cells, 4H.
"""

import keras
from keras import ops

from moe_tf import checks
from moe_tf.types import Tensor


def apply_gates(z_BG: Tensor, c_BH: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the LSTM's output before its projection, and the new memory.

    Args:
        z_BG: float, pre-activations of the gates `i, f, g, o`.
        c_BH: float, memory of the previous step.

    Returns:
        Two of float `(B, H)`.
    """
    i_BH, f_BH, g_BH, o_BH = ops.split(z_BG, 4, axis=-1)
    c_BH = ops.sigmoid(f_BH) * c_BH
    c_BH += ops.sigmoid(i_BH) * ops.tanh(g_BH)
    return ops.sigmoid(o_BH) * ops.tanh(c_BH), c_BH


@keras.saving.register_keras_serializable(package="moe_tf")
class ProjectedLSTMCell(keras.layers.Layer):
    """One step of an LSTM with a recurrent projection layer.

    With `r` the projected output of the previous step:

        i, f, o = sigmoid(x W_* + r R_*),  g = tanh(x W_g + r R_g)
        c = f * c + i * g
        r = (o * tanh(c)) P

    There are no biases and no peepholes. Gates are in the order `i, f, g, o`,
    as in `keras.layers.LSTMCell`, which gives the same result where `P` is the
    identity. Parameters: `(I + P) * 4H + H * P`. Wrap the cell in
    `keras.layers.RNN`.

    Args:
        units: int, memory cells `H`.
        projection_units: int, output width `P`.

    Call arguments:
        inputs: float `(B, I)`.
        states: `[r, c]` of shapes `(B, P)` and `(B, H)`.

    Returns:
        The output `(B, P)` and the next states.

    Raises:
        ValueError: if a size is below 1.

    Reference:
     - [Sak et al., 2014](https://arxiv.org/abs/1402.1128)

    Example:

    >>> cell = moe_tf.layers.ProjectedLSTMCell(units=16, projection_units=4)
    >>> rnn = keras.layers.RNN(cell, return_sequences=True)
    >>> tuple(rnn(np.ones((2, 3, 8))).shape)
    (2, 3, 4)
    """

    def __init__(self, units: int, projection_units: int, **kwargs) -> None:
        super().__init__(**kwargs)
        checks.at_least("units", units, 1)
        checks.at_least("projection_units", projection_units, 1)
        self.units = units
        self.projection_units = projection_units
        self.state_size = [projection_units, units]
        self.output_size = projection_units

    def build(self, input_shape):
        self.kernel_IG = self.add_weight(
            shape=(input_shape[-1], 4 * self.units),
            initializer="glorot_uniform",
            name="kernel",
        )
        self.recurrent_PG = self.add_weight(
            shape=(self.projection_units, 4 * self.units),
            initializer="orthogonal",
            name="recurrent_kernel",
        )
        self.projection_HP = self.add_weight(
            shape=(self.units, self.projection_units),
            initializer="glorot_uniform",
            name="projection_kernel",
        )

    def call(self, inputs, states, training=False):
        r_BP, c_BH = states
        z_BG = ops.matmul(inputs, self.kernel_IG)
        z_BG += ops.matmul(r_BP, self.recurrent_PG)
        h_BH, c_BH = apply_gates(z_BG, c_BH)
        r_BP = ops.matmul(h_BH, self.projection_HP)
        return r_BP, [r_BP, c_BH]

    def get_initial_state(self, batch_size=None):
        return [
            ops.zeros((batch_size, size), dtype=self.compute_dtype)
            for size in self.state_size
        ]

    def get_config(self):
        own = ("units", "projection_units")
        return {
            **super().get_config(),
            **{name: getattr(self, name) for name in own},
        }
