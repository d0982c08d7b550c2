"""The experts: feed-forward networks of one shape, each with own weights."""

import keras
import tensorflow as tf
from keras import ops

from moe_tf import checks
from moe_tf import dispatch


@keras.saving.register_keras_serializable(package="moe_tf")
class Experts(keras.layers.Layer):
    """`num_experts` networks `D -> hidden_units -> D` without biases.

    Each matrix of all experts is one kernel, so that one layout rule shards
    the experts. Every expert is initialised by itself, with fan-in `D`.

    Args:
        num_experts: int, `E`.
        hidden_units: int, `F`.
        activation: name or function between the two products. Defaults to
            `"relu"`.

    Call arguments:
        inputs: float `(S, D)`, slots in the order of `plan`.
        plan: `dispatch.Rows`, `Blocks` or `Capacity`.

    Returns:
        float `(S, D)`; slots that belong to no expert give zeros.
    """

    def __init__(self, num_experts, hidden_units, activation="relu", **kwargs):
        super().__init__(**kwargs)
        checks.at_least("num_experts", num_experts, 1)
        checks.at_least("hidden_units", hidden_units, 1)
        self.num_experts = num_experts
        self.hidden_units = hidden_units
        self.activation = keras.activations.get(activation)

    def build(self, input_shape):
        width = input_shape[-1]
        self.in_EDF = self._kernel("expert_in_kernel", width, self.hidden_units)
        self.out_EFD = self._kernel(
            "expert_out_kernel", self.hidden_units, width
        )
        self.built = True

    def _kernel(self, name, fan_in, fan_out):
        # glorot_uniform takes the leading axis for part of the fans, which
        # would make the weights of an expert smaller the more experts there
        # are; the limit of a single (fan_in, fan_out) matrix is given instead.
        limit = (6.0 / (fan_in + fan_out)) ** 0.5
        return self.add_weight(
            shape=(self.num_experts, fan_in, fan_out),
            initializer=keras.initializers.RandomUniform(-limit, limit),
            name=name,
        )

    def call(self, inputs, plan):
        if isinstance(plan, dispatch.Rows):
            return self._by_rows(inputs, plan.count_E)
        in_NDF, out_NFD = self._cast(self.in_EDF), self._cast(self.out_EFD)
        if isinstance(plan, dispatch.Blocks):
            in_NDF = tf.gather(in_NDF, plan.expert_N)
            out_NFD = tf.gather(out_NFD, plan.expert_N)
        return self._by_blocks(inputs, in_NDF, out_NFD)

    def _by_rows(self, x_SD, count_E):
        """A product for each expert, over as many rows as it has."""
        rest = ops.shape(x_SD)[0] - ops.sum(count_E)  # rows of masked tokens
        *x, x_rest = tf.split(
            x_SD, ops.append(count_E, rest), num=self.num_experts + 1
        )
        kernels = zip(
            tf.unstack(self._cast(self.in_EDF)),
            tf.unstack(self._cast(self.out_EFD)),
            strict=True,
        )
        y = [
            tf.matmul(self.activation(tf.matmul(rows, in_DF)), out_FD)
            for rows, (in_DF, out_FD) in zip(x, kernels, strict=True)
        ]
        return tf.concat([*y, tf.zeros_like(x_rest)], axis=0)

    def _by_blocks(self, x_SD, in_NDF, out_NFD):
        """One batched product over blocks of equal size."""
        num_blocks, width = ops.shape(in_NDF)[0], x_SD.shape[-1]
        x_NCD = ops.reshape(
            x_SD, (num_blocks, ops.shape(x_SD)[0] // num_blocks, width)
        )
        h_NCF = self.activation(tf.matmul(x_NCD, in_NDF))
        return ops.reshape(tf.matmul(h_NCF, out_NFD), ops.shape(x_SD))

    def _cast(self, kernel):
        return ops.cast(kernel, self.compute_dtype)

    def get_config(self):
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            "hidden_units": self.hidden_units,
            "activation": keras.activations.serialize(self.activation),
        }
