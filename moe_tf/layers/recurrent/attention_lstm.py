"""An LSTM that attends to the source, the bottom layer of the decoder.

Letters: `H` memory cells, `P` output width, `G` the four gates of all cells,
4H.
"""

from collections.abc import Sequence

import keras
import tensorflow as tf
from keras import ops

from moe_tf import checks
from moe_tf import sharding
from moe_tf.layers.attention.additive import AdditiveAttention
from moe_tf.layers.recurrent import mesh_scan
from moe_tf.layers.recurrent import projected_lstm
from moe_tf.types import Tensor


@keras.saving.register_keras_serializable(package="moe_tf")
class AttentionLSTM(keras.layers.Layer):
    """A projected LSTM whose input includes an attention context.

    At each position the previous output is the query of the attention, and
    the context is appended to the input, as in GNMT. The recurrence is that of
    `ProjectedLSTMCell`, from a zero state.

    Args:
        units: int, memory cells `H`.
        attention_units: int, attention width `A`.
        form: `"product"` or `"sum"`, see `AdditiveAttention`.

    Call arguments:
        inputs: float `(B, L, D)`.
        values_BSD: float, source vectors.
        key_BSA: float, `attention.keys(values_BSD)`.
        bias_BS: float32, 0 where there is a source word, -1e9 in padding.

    Returns:
        Float `(B, L, D)`.

    Raises:
        ValueError: if a size is below 1 or there is no such form.

    Reference:
     - [Wu et al., 2016](https://arxiv.org/abs/1609.08144)

    Example:

    >>> layer = moe_tf.layers.AttentionLSTM(units=16, attention_units=6)
    >>> layer.build((2, 3, 8))
    >>> values_BSD = np.ones((2, 5, 8), "float32")
    >>> y_BLD = layer(
    ...     np.ones((2, 3, 8), "float32"),
    ...     values_BSD,
    ...     layer.attention.keys(values_BSD),
    ...     bias_BS=np.zeros((2, 5), "float32"),
    ... )
    >>> tuple(y_BLD.shape)
    (2, 3, 8)
    """

    def __init__(
        self,
        units: int,
        attention_units: int,
        form: str = "product",
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        checks.at_least("units", units, 1)
        self.units = units
        self.attention = AdditiveAttention(
            attention_units, form, dtype=self.dtype_policy, name="attention"
        )

    def build(self, input_shape):
        width, num_gates = input_shape[-1], 4 * self.units
        self.kernel_IG = self.add_weight(
            shape=(2 * width, num_gates),
            initializer="glorot_uniform",
            name="kernel",
        )
        self.recurrent_PG = self.add_weight(
            shape=(width, num_gates),
            initializer="orthogonal",
            name="recurrent_kernel",
        )
        self.projection_HP = self.add_weight(
            shape=(self.units, width),
            initializer="glorot_uniform",
            name="projection_kernel",
        )
        self.attention.build(input_shape)

    def call(self, inputs, values_BSD, key_BSA, bias_BS):
        advance = self._advance(values_BSD, key_BSA, bias_BS)
        input_DG, _ = self._input_kernels()
        z_LBG = ops.einsum("BLD,DG->LBG", inputs, input_DG)
        states = self.initial_states(ops.shape(inputs)[0])
        if sharding.axes() is None:
            y_LBP = _loop(advance, z_LBG, states)
        else:
            y_LBP = _unrolled(advance, z_LBG, states)
        return ops.transpose(y_LBP, (1, 0, 2))

    def initial_states(self, num_rows: int | Tensor) -> list[Tensor]:
        """Returns zeros: the output `(N, P)` and the memory `(N, H)`."""
        sizes = (self.projection_HP.shape[1], self.units)
        return [
            ops.zeros((num_rows, size), dtype=self.compute_dtype)
            for size in sizes
        ]

    def step(
        self,
        x_ND: Tensor,
        states: Sequence[Tensor],
        values_NSD: Tensor,
        key_NSA: Tensor,
        bias_NS: Tensor,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Computes one position.

        Args:
            x_ND: float, input at the position.
            states: output and memory of the previous position.
            values_NSD, key_NSA, bias_NS: the source, as in the call.

        Returns:
            The output, float `(N, P)`, the weights on the source, float32
            `(N, S)`, and the next states.
        """
        advance = self._advance(values_NSD, key_NSA, bias_NS)
        input_DG, _ = self._input_kernels()
        r_NP, c_NH, weight_NS = advance(ops.matmul(x_ND, input_DG), *states)
        return r_NP, weight_NS, [r_NP, c_NH]

    def _input_kernels(self):
        """Returns the kernels of the input and of the context."""
        kernel_IG = ops.cast(self.kernel_IG, self.compute_dtype)
        return ops.split(kernel_IG, 2, axis=0)

    def _advance(self, values_BSD, key_BSA, bias_BS):
        """Returns a function that advances the states by one position.

        The function takes the product of the input and its kernel.
        """
        recurrent_PG, projection_HP = (
            ops.cast(kernel, self.compute_dtype)
            for kernel in (self.recurrent_PG, self.projection_HP)
        )
        _, context_DG = self._input_kernels()
        both_XG = ops.concatenate([context_DG, recurrent_PG], axis=0)

        def advance(z_BG, r_BP, c_BH):
            context_BLD, weight_BLS = self.attention(
                ops.expand_dims(r_BP, 1), values_BSD, key_BSA, bias_BS
            )
            context_BD = ops.squeeze(context_BLD, 1)
            both_BX = ops.concatenate([context_BD, r_BP], axis=-1)
            z_BG += ops.matmul(both_BX, both_XG)
            h_BH, c_BH = projected_lstm.apply_gates(
                mesh_scan.sharded_by_batch(z_BG), c_BH
            )
            weight_BS = ops.squeeze(weight_BLS, 1)
            return ops.matmul(h_BH, projection_HP), c_BH, weight_BS

        return advance

    def compute_output_shape(self, input_shape, *args, **kwargs):
        return input_shape

    def get_config(self):
        return {
            **super().get_config(),
            "units": self.units,
            "attention_units": self.attention.units,
            "form": self.attention.form,
        }


def _loop(advance, z_LBG, states):
    """Computes the outputs of all positions in a while loop."""
    length = tf.shape(z_LBG)[0]
    outputs = tf.TensorArray(z_LBG.dtype, length, element_shape=states[0].shape)

    def body(t, r_BP, c_BH, outputs):
        r_BP, c_BH, _ = advance(z_LBG[t], r_BP, c_BH)
        return t + 1, r_BP, c_BH, outputs.write(t, r_BP)

    *_, outputs = tf.while_loop(
        lambda t, *_: t < length,
        body,
        (0, *states, outputs),
        maximum_iterations=z_LBG.shape[0],  # XLA needs it for gradients
    )
    return outputs.stack()


def _unrolled(advance, z_LBG, states):
    """Computes the outputs of all positions on a mesh, without a loop."""
    sharded = mesh_scan.sharded_by_batch
    r_BP, c_BH = map(sharded, states)
    outputs = []
    for z_BG in tf.unstack(sharded(z_LBG)):
        r_BP, c_BH, _ = advance(sharded(z_BG), r_BP, c_BH)
        r_BP, c_BH = sharded(r_BP), sharded(c_BH)
        outputs.append(r_BP)
    return tf.stack(outputs)
