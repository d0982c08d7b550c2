"""The bottom layer of the decoder: an LSTM that attends to the source.

Letters: `H` memory cells, `P` output width, `G` the four gates of all cells,
4H.
"""

import keras
import tensorflow as tf
from keras import ops

from moe_tf import checks
from moe_tf import sharding
from moe_tf.layers.attention.additive import AdditiveAttention
from moe_tf.layers.recurrent import projected_lstm


@keras.saving.register_keras_serializable(package="moe_tf")
class AttentionLSTM(keras.layers.Layer):
    """A projected LSTM that reads, beside its input, what it attends to.

    At each position the output of the one before is the query; the context
    that it gets is appended to the input, as in GNMT. The recurrence is that
    of `ProjectedLSTMCell`, from a zero state.

    Args:
        units: int, memory cells `H`.
        attention_units: int, attention width `A`.
        form: `"product"` or `"sum"`, see `AdditiveAttention`.

    Call arguments:
        inputs: float `(B, L, D)`.
        values_BSD: float, source vectors.
        key_BSA: float, `attention.keys(values_BSD)`.
        bias_BS: float32, `multi_head.mask_bias` of the source.

    Returns:
        Float `(B, L, D)`.

    Raises:
        ValueError: if a size is below 1 or there is no such form.

    Reference:
     - [Wu et al., 2016](https://arxiv.org/abs/1609.08144)
    """

    def __init__(self, units, attention_units, form="product", **kwargs):
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

    def initial_states(self, num_rows):
        """Output and memory before the first position, of `(N, width)`."""
        sizes = (self.projection_HP.shape[1], self.units)
        return [
            ops.zeros((num_rows, size), dtype=self.compute_dtype)
            for size in sizes
        ]

    def step(self, x_ND, states, values_NSD, key_NSA, bias_NS):
        """One position: the output, the weights on the source, the states."""
        advance = self._advance(values_NSD, key_NSA, bias_NS)
        input_DG, _ = self._input_kernels()
        r_NP, c_NH, weight_NS = advance(ops.matmul(x_ND, input_DG), *states)
        return r_NP, weight_NS, [r_NP, c_NH]

    def _input_kernels(self):
        """What the input is multiplied by, and what the context is."""
        kernel_IG = ops.cast(self.kernel_IG, self.compute_dtype)
        return ops.split(kernel_IG, 2, axis=0)

    def _advance(self, values_BSD, key_BSA, bias_BS):
        """The recurrence, of which the input's share is computed before."""
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
            h_BH, c_BH = projected_lstm.apply_gates(_rows(z_BG), c_BH)
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
    """Outputs at every position."""
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
    """The same on a mesh, whose devices share the sequences."""
    r_BP, c_BH = map(_rows, states)
    outputs = []
    for z_BG in tf.unstack(sharding.constrain(z_LBG, None, "batch", None)):
        r_BP, c_BH, _ = advance(_rows(z_BG), r_BP, c_BH)
        r_BP, c_BH = _rows(r_BP), _rows(c_BH)
        outputs.append(r_BP)
    return tf.stack(outputs)


def _rows(x_BD):
    """`x_BD`, its rows shared by the devices of a mesh; itself off one."""
    return sharding.constrain(x_BD, "batch", None)
