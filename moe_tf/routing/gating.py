"""Gating functions: equations 3-6, 8-10, 16 and 18.

Noisy top-k gating and its load estimate; gates in which tokens have different
numbers of experts; sums over the tokens of each expert.
"""

import math
import typing

import tensorflow as tf
from keras import ops

from moe_tf import sharding
from moe_tf import top_k
from moe_tf import xla
from moe_tf.types import Tensor

# Lower bound of the noise's standard deviation in the load estimate, which
# keeps the quotient finite when Softplus underflows.
_SMALLEST_STD = 1e-6


class Gates(typing.NamedTuple):
    """The experts of `T` tokens and their weights.

    Attributes:
        weight_TK: float, the gate value of each chosen expert; 0 where there
            is none.
        expert_TK: int32, the chosen experts. `num_experts`, one past the last,
            stands for no expert: where a token has fewer than `K` experts,
            and everywhere for a masked token.

    Example:

    >>> gates = moe_tf.layers.Gates(
    ...     weight_TK=np.array([[0.75, 0.25], [1.0, 0.0]]),
    ...     expert_TK=np.array([[2, 0], [1, 3]]),  # of 3 experts
    ... )
    >>> gates.weight_TK.sum(axis=-1)
    array([1., 1.])
    """

    weight_TK: Tensor
    expert_TK: Tensor


def noisy_top_k(
    clean_TE: Tensor,
    k: int,
    std_TE: Tensor | None = None,
    draw_TE: Tensor | None = None,
) -> tuple[Gates, Tensor | None]:
    """Softmax over each token's `k` largest noisy logits, equations 3-5.

    Args:
        clean_TE: float `(..., E)`, logits without noise.
        k: int, experts kept.
        std_TE: optional float `(..., E)`, standard deviation of the noise.
        draw_TE: optional float `(..., E)`, standard normal draws. Required
            with `std_TE`; an argument so that the function is pure.

    Returns:
        `(gates, probability_TE)`: `Gates` of shape `(..., k)`, and the
        probability that each expert is chosen if its own noise alone is drawn
        again (equations 8 and 9); `None` without noise.
    """
    num_experts = clean_TE.shape[-1]
    noisy_TE = clean_TE if std_TE is None else clean_TE + std_TE * draw_TE
    top, expert_TK = top_k_and_next(noisy_TE, k)
    gates = Gates(softmax(top[..., :k]), expert_TK)
    if std_TE is None:
        return gates, None
    if k == num_experts:  # no threshold: every expert is chosen
        return gates, ops.ones_like(clean_TE)
    return gates, load_probability(clean_TE, noisy_TE, std_TE, top)


def top_k_and_next(logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the `k` largest logits of each token, and the next one.

    Args:
        logits_TE: float `(..., E)`.
        k: int, experts kept.

    Returns:
        `(top, expert_TK)`: `top` is float `(..., k + 1)` in descending order,
        or `(..., k)` when `k` is the number of experts and nothing is left;
        `expert_TK` are the int32 experts of the first `k`. Of equal logits
        the first expert comes first.
    """
    top, expert = top_k.small_top_k(logits_TE, min(k + 1, logits_TE.shape[-1]))
    # Sliced first: GPUs leave a slice of int32 to the host.
    return top, ops.cast(expert[..., :k], "int32")


def softmax(logits: Tensor) -> Tensor:
    """Computes the softmax over the last axis."""
    # Written out because `ops.softmax` warns of an axis of one, `k = 1`.
    return ops.exp(logits - ops.logsumexp(logits, axis=-1, keepdims=True))


def mask_gates(gates: Gates, num_experts: int, mask_T: Tensor | None) -> Gates:
    """Takes tokens out of the gates where the optional mask is `False`."""
    if mask_T is None:
        return gates
    keep_T1 = mask_T[:, None]
    weight_TK, expert_TK = gates
    return Gates(
        ops.where(keep_T1, weight_TK, ops.zeros_like(weight_TK)),
        ops.where(keep_T1, expert_TK, ops.full_like(expert_TK, num_experts)),
    )


def batchwise_mask(
    score_TE: Tensor,
    num_chosen: int | Tensor,
    max_chosen: int | Tensor,
    mask_T: Tensor | None = None,
) -> Tensor:
    """Marks the tokens with the largest scores of each expert, equation 18.

    Of equal scores that of the earlier token counts as larger. NaN counts as
    the largest score, so that it reaches the outputs and is noticed.

    Args:
        score_TE: float.
        num_chosen: int or int32 scalar, `m`, tokens that each expert chooses.
        max_chosen: int, or int32 scalar outside XLA, at least `num_chosen`
            and at most `T`; shapes depend on it.
        mask_T: optional bool; masked tokens are not chosen. `num_chosen` is
            at most the number of unmasked tokens.

    Returns:
        bool `(T, E)` with `num_chosen` true entries for each expert.
    """
    num_tokens, num_experts = ops.shape(score_TE)
    top = ops.full_like(score_TE, float("inf"))
    score_TE = ops.where(ops.isnan(score_TE), top, score_TE)
    if mask_T is not None:
        score_TE = ops.where(mask_T[:, None], score_TE, -top)
    _, token_EC = tf.math.top_k(ops.transpose(score_TE), max_chosen)
    expert_E1 = ops.arange(num_experts, dtype="int32")[:, None]
    index_EC = token_EC * num_experts + expert_E1
    taken_EC = ops.broadcast_to(
        ops.arange(max_chosen) < num_chosen, ops.shape(index_EC)
    )
    chosen = tf.scatter_nd(
        ops.reshape(index_EC, (-1, 1)),
        ops.reshape(ops.cast(taken_EC, "int32"), (-1,)),
        [num_tokens * num_experts],
    )
    return ops.reshape(chosen, (num_tokens, num_experts)) > 0


def batchwise_mask_in_groups(
    score_GTE: Tensor, num_chosen_G: Tensor, mask_GT: Tensor | None = None
) -> Tensor:
    """Computes `batchwise_mask` in each token group separately.

    Args:
        score_GTE: float.
        num_chosen_G: int32, `m` of each group; or one int for all.
        mask_GT: optional bool.

    Returns:
        bool `(G, T, E)`.
    """
    top = ops.full_like(score_GTE, float("inf"))
    score_GTE = ops.where(ops.isnan(score_GTE), top, score_GTE)
    if mask_GT is not None:
        score_GTE = ops.where(mask_GT[..., None], score_GTE, -top)
    lowest_first_GET = -ops.transpose(score_GTE, (0, 2, 1))
    # The rank of each token: a sort, and the inverse of its permutation.
    order_GET = tf.argsort(lowest_first_GET, stable=True)
    rank_GET = tf.argsort(order_GET, stable=True)
    num_chosen_G = ops.convert_to_tensor(num_chosen_G, "int32")
    chosen_GET = rank_GET < ops.reshape(num_chosen_G, (-1, 1, 1))
    return ops.transpose(chosen_GET, (0, 2, 1))


def softmax_over_chosen(logits_TE: Tensor, chosen_TE: Tensor) -> Tensor:
    """Softmax over the chosen experts alone, equation 16.

    Computed from logits, since the softmax over all experts may underflow to
    0 for each chosen expert.

    Args:
        logits_TE: float `(..., E)`.
        chosen_TE: bool `(..., E)`.

    Returns:
        float `(..., E)`; zeros for a token without an expert.
    """
    lowest = -float("inf")
    top_T1 = ops.max(
        ops.where(chosen_TE, logits_TE, lowest),
        axis=-1,
        keepdims=True,
        initial=lowest,  # or Keras refuses a batch without tokens
    )
    some_T1 = ops.any(chosen_TE, axis=-1, keepdims=True)
    top_T1 = ops.stop_gradient(ops.where(some_T1, top_T1, 0))
    kept_TE = ops.exp(ops.where(chosen_TE, logits_TE - top_T1, 0))
    kept_TE = ops.where(chosen_TE, kept_TE, 0)
    total_T1 = ops.sum(kept_TE, axis=-1, keepdims=True)
    return kept_TE / ops.where(some_T1, total_T1, 1)


def gates_of_chosen(
    weight_TE: Tensor, chosen_TE: Tensor, max_experts: int | Tensor
) -> Gates:
    """Makes `Gates` where tokens may have different numbers of experts.

    Args:
        weight_TE: float, gate values.
        chosen_TE: bool, whether an expert is chosen for a token.
        max_experts: int or int32 scalar, `K`, at least the number of experts
            of any token.

    Returns:
        `Gates`, in which each token's experts are in ascending order.
    """
    num_experts = chosen_TE.shape[-1]
    # The ones are the largest entries, and of equal entries the first is first.
    _, expert_TK = tf.math.top_k(ops.cast(chosen_TE, "int32"), max_experts)
    used_TK = tf.gather(chosen_TE, expert_TK, batch_dims=1)
    weight_TK = top_k.take_entries(weight_TE, expert_TK)
    return Gates(
        ops.where(used_TK, weight_TK, ops.zeros_like(weight_TK)),
        ops.where(used_TK, expert_TK, ops.full_like(expert_TK, num_experts)),
    )


def load_probability(
    clean_TE: Tensor, noisy_TE: Tensor, std_TE: Tensor, top: Tensor
) -> Tensor:
    """Probability that an expert is chosen if its noise alone is drawn again.

    Equations 8 and 9: the normal CDF of (clean logit - threshold) / noise
    deviation, where the threshold is the `k`-th largest *noisy* logit of the
    other experts. The probability is smooth in the logits of all experts.

    Args:
        clean_TE: float `(..., E)`, logits before the noise.
        noisy_TE: float `(..., E)`, logits after the noise.
        std_TE: float `(..., E)`, standard deviation of the noise.
        top: float `(..., K + 1)` from `top_k_and_next(noisy_TE, k)`.

    Returns:
        float `(..., E)` in [0, 1].
    """
    kth_T1, next_T1 = top[..., -2:-1], top[..., -1:]
    chosen_TE = noisy_TE > next_T1
    threshold_TE = ops.where(chosen_TE, next_T1, kth_T1)
    std_TE = ops.maximum(std_TE, _SMALLEST_STD)
    return normal_cdf((clean_TE - threshold_TE) / std_TE)


def importance(gates: Gates, num_experts: int) -> Tensor:
    """Sums the gate values of each expert, equation 6: `(E,)`."""
    return sum_by_expert(gates.weight_TK, gates.expert_TK, num_experts)


def count_assigned(gates: Gates, num_experts: int) -> Tensor:
    """Counts the tokens that chose each expert: float `(E,)`."""
    ones_TK = ops.ones_like(gates.weight_TK)
    return sum_by_expert(ones_TK, gates.expert_TK, num_experts)


def sum_by_expert(value: Tensor, expert: Tensor, num_experts: int) -> Tensor:
    """Sums `value` over the entries of each expert.

    Args:
        value: float, of the shape of `expert`, perhaps with further axes.
        expert: int32; entries of `num_experts` are left out.
        num_experts: int, `E`.

    Returns:
        float `(E, ...)`.
    """
    if sharding.axes() is not None:
        return _sum_on_mesh(value, expert, num_experts)
    further = ops.shape(value)[len(expert.shape) :]
    # Entries of `num_experts` form a last segment, which is cut off.
    sums = ops.segment_sum(
        ops.reshape(value, (-1, *further)),
        ops.reshape(expert, (-1,)),
        num_segments=num_experts + 1,
    )
    return sums[:num_experts]


def _sum_on_mesh(value_TK, expert_TK, num_experts):
    """Sums on each device over its own tokens, then over the devices."""
    further = len(value_TK.shape) - len(expert_TK.shape)
    expert_TK = xla.as_index(expert_TK)

    def value_of_choice(j):
        hot_TE = ops.one_hot(expert_TK[:, j], num_experts, dtype=value_TK.dtype)
        for _ in range(further):
            hot_TE = hot_TE[..., None]
        return hot_TE * value_TK[:, j, None]

    choices = range(expert_TK.shape[1])
    return ops.sum(sum(value_of_choice(j) for j in choices), axis=0)


def normal_cdf(z: Tensor) -> Tensor:
    """Cumulative distribution function of the standard normal."""
    return 0.5 * (1.0 + ops.erf(z / math.sqrt(2.0)))
