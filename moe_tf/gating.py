"""Noisy top-k gating and the load estimate, equations 3-5 and 8-10."""

import typing

from keras import ops

from moe_tf import numerics

# Below this the noise is as good as absent; it keeps the quotient in the load
# estimate finite when Softplus underflows.
_SMALLEST_STD = 1e-6


class Gates(typing.NamedTuple):
    """What a router decides for `T` tokens.

    Attributes:
        weight_TK: float, the gate value of each chosen expert.
        expert_TK: int32, the chosen experts; `num_experts`, one past the
            last, where a masked token goes nowhere.
    """

    weight_TK: typing.Any
    expert_TK: typing.Any


def top_k_and_next(logits_TE, k):
    """The `k` largest logits of each token, and the one after them.

    Returns:
        `(top, expert_TK)`: `top` is float `(T, k + 1)` in descending order,
        or `(T, k)` when `k` is the number of experts and nothing is left;
        `expert_TK` are the int32 experts of the first `k`.
    """
    num_experts = logits_TE.shape[-1]
    top, expert = ops.top_k(logits_TE, min(k + 1, num_experts))
    return top, ops.cast(expert[:, :k], "int32")


def gates(top, expert_TK, num_experts, mask_T=None):
    """Softmax over the kept logits of each token, equations 3 and 5.

    Tokens where `mask_T` is `False` get zero weights and no expert.

    Args:
        top: float `(T, >= K)`, the kept logits first.
        expert_TK: int32 `(T, K)`.
        num_experts: int.
        mask_T: optional bool `(T,)`.

    Returns:
        `Gates`.
    """
    top_TK = top[:, : expert_TK.shape[-1]]
    # Written out because `ops.softmax` warns of an axis of one, `k = 1`.
    weight_TK = ops.exp(top_TK - ops.logsumexp(top_TK, axis=-1, keepdims=True))
    if mask_T is not None:
        keep_T1 = mask_T[:, None]
        weight_TK = ops.where(keep_T1, weight_TK, ops.zeros_like(weight_TK))
        nowhere_TK = ops.full_like(expert_TK, num_experts)
        expert_TK = ops.where(keep_T1, expert_TK, nowhere_TK)
    return Gates(weight_TK, expert_TK)


def load_probability(clean_TE, noisy_TE, std_TE, top):
    """Chance that an expert is chosen if only its noise is drawn again.

    Equations 8 and 9: the normal CDF of (clean logit - threshold) / noise
    deviation, where the threshold is the `k`-th largest *noisy* logit of the
    other experts. It is smooth in the logits of all experts, chosen or not.

    Args:
        clean_TE: float, logits before the noise.
        noisy_TE: float, logits after the noise.
        std_TE: float, standard deviation of the noise.
        top: float `(T, K + 1)` from `top_k_and_next(noisy_TE, k)`.

    Returns:
        float `(T, E)` in [0, 1].
    """
    kth_T1, next_T1 = top[:, -2, None], top[:, -1, None]
    chosen_TE = noisy_TE > next_T1
    threshold_TE = ops.where(chosen_TE, next_T1, kth_T1)
    std_TE = ops.maximum(std_TE, _SMALLEST_STD)
    return numerics.normal_cdf((clean_TE - threshold_TE) / std_TE)


def importance(gates, num_experts):
    """Sum of each expert's gate values over the batch, equation 6: `(E,)`."""
    return _sum_by_expert(gates.weight_TK, gates.expert_TK, num_experts)


def assigned(gates, num_experts):
    """Number of tokens that chose each expert, float `(E,)`."""
    ones_TK = ops.ones_like(gates.weight_TK)
    return _sum_by_expert(ones_TK, gates.expert_TK, num_experts)


def _sum_by_expert(value_TK, expert_TK, num_experts):
    # Masked tokens carry the id `num_experts`: a last segment that is cut.
    sums = ops.segment_sum(
        ops.reshape(value_TK, (-1,)),
        ops.reshape(expert_TK, (-1,)),
        num_segments=num_experts + 1,
    )
    return sums[:num_experts]
