"""The experts: feed-forward networks of one shape, each with own weights."""

import keras
from keras import ops

from moe_tf import checks
from moe_tf import grouped


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
        recompute: bool, whether the hidden activations, `(S, F)`, are
            computed again in the backward pass instead of being kept.
            Defaults to `False`.

    Call arguments:
        inputs: float `(S, D)`, slots in the order of `plan`.
        plan: `dispatch.Rows`, `Blocks` or `Capacity`.

    Returns:
        float `(S, D)`; slots that belong to no expert give zeros.

    Reference:
     - [Shazeer et al., 2017](https://arxiv.org/abs/1701.06538), appendix D,
       for the recomputation
    """

    def __init__(
        self,
        num_experts,
        hidden_units,
        activation="relu",
        recompute=False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        checks.at_least("num_experts", num_experts, 1)
        checks.at_least("hidden_units", hidden_units, 1)
        self.num_experts = num_experts
        self.hidden_units = hidden_units
        self.activation = keras.activations.get(activation)
        self.recompute = recompute

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
        kernels = [
            ops.cast(kernel, self.compute_dtype)
            for kernel in (self.in_EDF, self.out_EFD)
        ]

        def run(x_SD, *kernels):
            return grouped.apply(self._expert, x_SD, kernels, plan)

        if self.recompute:
            run = grouped.recomputed(run)
        return run(inputs, *kernels)

    def _expert(self, x_CD, in_DF, out_FD):
        h_CF = self.activation(grouped.matmul(x_CD, in_DF))
        return grouped.matmul(h_CF, out_FD)

    def get_config(self):
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            "hidden_units": self.hidden_units,
            "activation": keras.activations.serialize(self.activation),
            "recompute": self.recompute,
        }
