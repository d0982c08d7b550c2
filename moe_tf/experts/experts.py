"""The experts: feed-forward networks of one shape, each with own weights."""

import keras
from keras import ops

from moe_tf import checks
from moe_tf import xla
from moe_tf.dispatch import grouped
from moe_tf.dispatch import plans
from moe_tf.experts import gpu


@keras.saving.register_keras_serializable(package="moe_tf")
class Experts(keras.layers.Layer):
    """`num_experts` networks `D -> hidden_units -> D` without biases.

    Each matrix of all experts is one kernel, so that one layout rule shards
    the experts. Every expert is initialised by itself, with fan-in `D`.

    Inside XLA on a GPU the products are those of `moe_tf.gpu_experts`, if they
    can be: see `block_size`. Else TensorFlow's.

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
        plan: `plans.Rows`, `Blocks`, `Capacity`, or `Groups`, with which
            slots have a first axis `G`.
        training: bool.

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
        checks.true_or_false("recompute", recompute)
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
            autocast=False,  # cast here, so that what reads it is seen
            name=name,
        )

    def block_size(self, num_tokens, k):
        """Slots in a block of the plan that the kernels for a GPU work on.

        Args:
            num_tokens: int, or a tensor where it is not known yet.
            k: int, experts of each token, for their mean load.

        Returns:
            An int, or `None` where those kernels are not to be used: outside
            XLA, on another device, for sizes they do not serve
            (`gpu_experts.obstacle`), for a number of tokens that is not known
            when traced, and where the blocks of most experts would be less
            than half full.
        """
        if not isinstance(num_tokens, int) or not self._has_kernels():
            return None
        if 2 * num_tokens * k < gpu.BLOCK * self.num_experts:
            return None
        return gpu.BLOCK

    def _has_kernels(self):
        if not xla.wants_static_shapes() or not xla.on_gpu(self.in_EDF):
            return False
        width, hidden_units = self.in_EDF.shape[1:]
        return not gpu.obstacle(
            width, hidden_units, self.compute_dtype, self.activation
        )

    def call(self, inputs, plan, training=False):
        if self._are_for_kernels(inputs, plan):
            return gpu.feed_forward(
                inputs,
                self.in_EDF.value,
                self.out_EFD.value,
                plan,
                self.activation,
                # Without a backward pass there is nothing to keep.
                recompute=self.recompute or not training,
            )
        kernels = [
            ops.cast(kernel, self.compute_dtype)
            for kernel in (self.in_EDF, self.out_EFD)
        ]

        def run(x_SD, *kernels):
            return grouped.apply(self._expert, x_SD, kernels, plan)

        if self.recompute:
            run = grouped.recomputed(run)
        return run(inputs, *kernels)

    def _are_for_kernels(self, x_SD, plan):
        if not isinstance(plan, plans.Blocks) or not self._has_kernels():
            return False
        num_slots, num_blocks = x_SD.shape[0], plan.expert_N.shape[0]
        if num_slots is None:
            return False
        return num_slots == num_blocks * gpu.BLOCK

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
