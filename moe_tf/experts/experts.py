"""The experts: feed-forward networks of one shape, each with own weights."""

import keras
from keras import ops

from moe_tf import checks
from moe_tf import xla
from moe_tf.dispatch import grouped
from moe_tf.experts import gpu
from moe_tf.types import Activation
from moe_tf.types import Tensor


@keras.saving.register_keras_serializable(package="moe_tf")
class Experts(keras.layers.Layer):
    """`num_experts` networks `D -> hidden_units -> D` without biases.

    The matrices of all experts are stacked in two kernels, `(E, D, F)` and
    `(E, F, D)`, so that one layout rule shards the experts. Each expert is
    initialised as a network of its own.

    Inside XLA on a GPU the kernels of `moe_tf.experts.gpu` compute the
    products where they can (see `block_size`), elsewhere TensorFlow does.

    Args:
        num_experts: int, `E`.
        hidden_units: int, `F`.
        activation: name or function between the two products. Defaults to
            `"relu"`.
        recompute: bool, whether the hidden activations, `(S, F)`, are
            computed again in the backward pass instead of being kept.
            Defaults to `False`.

    Call arguments:
        inputs: float `(S, D)`, the slots of `plan`, as `plan.dispatch` gives
            them; `(G, S, D)` with token groups.
        plan: `moe_tf.dispatch.plan.Plan`.
        training: bool.

    Returns:
        Float of the shape of the inputs; slots without a token give zeros.

    Example:

    >>> from moe_tf.dispatch import plans
    >>> plan = plans.plan_rows(tf.constant([[1], [0], [1]]), num_experts=2)
    >>> x_SD = plan.dispatch(tf.ones((3, 8)))
    >>> moe_tf.layers.Experts(2, hidden_units=16)(x_SD, plan=plan).shape
    TensorShape([3, 8])

    Reference:
     - [Shazeer et al., 2017](https://arxiv.org/abs/1701.06538), appendix D,
       for the recomputation
    """

    def __init__(
        self,
        num_experts: int,
        hidden_units: int,
        activation: Activation = "relu",
        recompute: bool = False,
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
        # glorot_uniform counts the leading axis in the fans, so weights would
        # be smaller the more experts there are. This is the limit for a
        # single matrix (fan_in, fan_out).
        limit = (6.0 / (fan_in + fan_out)) ** 0.5
        return self.add_weight(
            shape=(self.num_experts, fan_in, fan_out),
            initializer=keras.initializers.RandomUniform(-limit, limit),
            autocast=False,  # Cast in `call`: the GPU kernels read it uncast.
            name=name,
        )

    def block_size(self, num_tokens: int | Tensor, k: int) -> int | None:
        """Returns the size of the blocks that the GPU kernels work on.

        Args:
            num_tokens: int, or a scalar where the number is not static.
            k: int, experts of each token.

        Returns:
            An int, slots in a block of the plan. `None` where the GPU kernels
            must not be used: outside XLA, on another device, for sizes that
            the kernels do not support (`gpu.obstacle`), for a number of tokens
            that is not static, and where the blocks of most experts would be
            less than half full.
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
        if inputs.shape[0] is not None and self._kernels_serve(plan):
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
            return plan.apply(self._expert, x_SD, kernels)

        if self.recompute:
            run = grouped.recomputed(run)
        return run(inputs, *kernels)

    def _kernels_serve(self, plan):
        # A tensor if the number of slots is not static.
        is_static = isinstance(plan.block_size, int)
        return (
            is_static and plan.block_size == gpu.BLOCK and self._has_kernels()
        )

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
