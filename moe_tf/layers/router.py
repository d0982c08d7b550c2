"""Routers choose the experts of each token."""

import typing

import keras
from keras import ops

from moe_tf import checks
from moe_tf import gating
from moe_tf import numerics


class Routing(typing.NamedTuple):
    """What a router returns for `T` tokens.

    Attributes:
        gates: `gating.Gates`, the chosen experts and their weights.
        importance_E: float, sum of each expert's gate values, equation 6.
        load_E: float, how many tokens each expert is expected to receive,
            equation 10; without noise, how many it receives.
    """

    gates: gating.Gates
    importance_E: typing.Any
    load_E: typing.Any


@keras.saving.register_keras_serializable(package="moe_tf")
class NoisyTopKRouter(keras.layers.Layer):
    """Chooses `k` of `num_experts` experts for every token, equations 3-5.

    Noise is drawn only when `training`. Both kernels start at zero, so that
    the load starts balanced (appendix A). In training the layer adds the
    importance loss (equation 7) and the load loss (equation 11), weighted
    and taken over the whole batch. Masked tokens get zero weights and count
    toward no loss and no number. The math is float32 under every dtype
    policy except float64, and callers cast the result.

    Args:
        num_experts: int, `E`.
        k: int, experts kept for each token, `1 <= k <= E`. Defaults to `4`.
        importance_weight: float, `w_importance` of equation 7; 0 turns the
            loss off. Defaults to `0.1`.
        load_weight: float, `w_load` of equation 11; 0 turns the loss off.
            Defaults to `0.1`.
        seed: optional int for the noise.

    Call arguments:
        inputs: float `(T, D)`.
        mask: optional bool `(T,)`.
        training: bool.

    Returns:
        `Routing`.

    Reference:
     - [Shazeer et al., 2017](https://arxiv.org/abs/1701.06538), section 2,
       appendix A
    """

    def __init__(
        self,
        num_experts,
        k=4,
        importance_weight=0.1,
        load_weight=0.1,
        seed=None,
        dtype=None,
        **kwargs,
    ):
        super().__init__(dtype=router_dtype(dtype), **kwargs)
        checks.at_least("num_experts", num_experts, 1)
        checks.at_least("k", k, 1)
        if k > num_experts:
            raise ValueError(
                "`k` must be between 1 and `num_experts`. "
                f"Received: k={k}, num_experts={num_experts}"
            )
        checks.not_negative("importance_weight", importance_weight)
        checks.not_negative("load_weight", load_weight)
        self.num_experts = num_experts
        self.k = k
        self.importance_weight = importance_weight
        self.load_weight = load_weight
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)
        self.supports_masking = True

    def build(self, input_shape):
        shape_DE = (input_shape[-1], self.num_experts)
        self.gate_DE, self.noise_DE = (
            self.add_weight(shape=shape_DE, initializer="zeros", name=name)
            for name in ("gate_kernel", "noise_kernel")
        )

    def call(self, inputs, mask=None, training=False):
        clean_TE = ops.matmul(inputs, self.gate_DE)
        noisy_TE = clean_TE
        if training:
            std_TE = ops.softplus(ops.matmul(inputs, self.noise_DE))
            draw_TE = keras.random.normal(
                ops.shape(clean_TE), dtype=self.dtype, seed=self.seed_generator
            )
            noisy_TE = clean_TE + std_TE * draw_TE
        top, expert_TK = gating.top_k_and_next(noisy_TE, self.k)
        gates = gating.gates(top, expert_TK, self.num_experts, mask)
        importance_E = gating.importance(gates, self.num_experts)
        if training and self.k < self.num_experts:
            chance_TE = gating.load_probability(clean_TE, noisy_TE, std_TE, top)
            if mask is not None:
                chance_TE *= ops.cast(mask, chance_TE.dtype)[:, None]
            load_E = ops.sum(chance_TE, axis=0)
        else:  # no noise, or nothing to leave out: the load is known
            load_E = gating.assigned(gates, self.num_experts)
        if training:
            self._add_losses(importance_E, load_E)
        return Routing(gates, importance_E, load_E)

    def _add_losses(self, importance_E, load_E):
        for weight, vector_E in (
            (self.importance_weight, importance_E),
            (self.load_weight, load_E),
        ):
            if weight:
                self.add_loss(weight * numerics.cv_squared(vector_E))

    def get_config(self):
        own = ("num_experts", "k", "importance_weight", "load_weight", "seed")
        return {
            **super().get_config(),
            **{name: getattr(self, name) for name in own},
        }


def router_dtype(dtype):
    """float64 under a float64 policy, float32 under any other."""
    policy = keras.dtype_policies.get(dtype or keras.config.dtype_policy())
    return "float64" if policy.compute_dtype == "float64" else "float32"
