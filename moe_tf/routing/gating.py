"""Which experts a token gets, with which weights: equations 3-5 and 8-10.

Noisy top-k gating and its load estimate; gates in which the number of experts
is not the same for every token; the numbers of a batch.
"""

import math
import typing

import tensorflow as tf
from keras import ops

from moe_tf import sharding
from moe_tf import top_k
from moe_tf.dispatch import sorting

# Below this the noise is as good as absent; it keeps the quotient in the load
# estimate finite when Softplus underflows.
_SMALLEST_STD = 1e-6


class Gates(typing.NamedTuple):
    """What a router decides for `T` tokens.

    Attributes:
        weight_TK: float, the gate value of each chosen expert.
        expert_TK: int32, the chosen experts; `num_experts`, one past the
            last, where a token uses fewer than `K`, and everywhere for a
            masked token, which goes nowhere. The weight there is 0.
    """

    weight_TK: typing.Any
    expert_TK: typing.Any


def noisy_top_k(clean_TE, k, std_TE=None, draw_TE=None):
    """Softmax over each token's `k` largest noisy logits, equations 3-5.

    Args:
        clean_TE: float `(..., E)`, logits without noise.
        k: int, experts kept.
        std_TE: optional float `(..., E)`, standard deviation of the noise.
        draw_TE: optional float `(..., E)`, normal draws, with `std_TE`; an
            argument so that this stays a pure function.

    Returns:
        `(gates, chance_TE)`: `Gates` of shape `(..., k)`, and the chance that
        each expert is chosen if only its noise is drawn again (equations 8
        and 9), `None` without noise.
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


def top_k_and_next(logits_TE, k):
    """The `k` largest logits of each token, and the one after them.

    Returns:
        `(top, expert_TK)`: `top` is float `(..., k + 1)` in descending order,
        or `(..., k)` when `k` is the number of experts and nothing is left;
        `expert_TK` are the int32 experts of the first `k`. Of equal logits
        the first expert comes first.
    """
    num_experts = logits_TE.shape[-1]
    most = min(k + 1, num_experts)
    narrow = top_k.narrow_top_k_pays(num_experts)
    if narrow:
        expert = top_k.narrow_top_k(logits_TE, most)
    else:
        top, expert = ops.top_k(logits_TE, most)
    if narrow or sharding.axes() is not None:
        top = entries(logits_TE, expert)  # on a mesh for its gradient
    # GPUs leave a slice of int32 to the host.
    return top, ops.cast(sorting.as_index(expert)[..., :k], "int32")


def entries(x_TE, index_TK):
    """The entries of each token at its indices, `(..., K)`."""
    leading = len(index_TK.shape) - 1

    def gather(x_TE):
        return tf.gather(x_TE, index_TK, batch_dims=leading)

    if sharding.axes() is None:
        return gather(x_TE)

    # On a mesh the gradient of a gather would be a scatter by every device of
    # the tokens of all.
    @tf.custom_gradient
    def picked(x_TE):
        def gradient(dy_TK):
            return _spread(dy_TK, index_TK, x_TE.shape[-1])

        return gather(x_TE), gradient

    return picked(x_TE)


def _spread(y_TK, index_TK, size):
    """Zeros `(..., E)` with `y` added at the indices, column by column."""
    index_TK = sorting.as_index(index_TK)
    return sum(
        y_TK[..., j, None]
        * ops.one_hot(index_TK[..., j], size, dtype=y_TK.dtype)
        for j in range(index_TK.shape[-1])
    )


def softmax(logits):
    """Softmax over the last axis."""
    # Written out because `ops.softmax` warns of an axis of one, `k = 1`.
    return ops.exp(logits - ops.logsumexp(logits, axis=-1, keepdims=True))


def masked(gates, num_experts, mask_T):
    """The gates without the tokens where the optional mask is `False`."""
    if mask_T is None:
        return gates
    keep_T1 = mask_T[:, None]
    weight_TK, expert_TK = gates
    return Gates(
        ops.where(keep_T1, weight_TK, ops.zeros_like(weight_TK)),
        ops.where(keep_T1, expert_TK, ops.full_like(expert_TK, num_experts)),
    )


def batchwise_mask(score_TE, num_chosen, most, mask_T=None):
    """Which tokens are among the largest of an expert's column, equation 18.

    Of equal scores the earlier token is the larger. A token whose scores are
    NaN is taken first, so that it shows in what follows.

    Args:
        score_TE: float.
        num_chosen: int or int32 scalar, `m`: how many every expert takes.
        most: int, or int32 scalar outside XLA, at least `num_chosen` and at
            most `T`; the shapes depend on it.
        mask_T: optional bool; masked tokens are not taken. `num_chosen` is
            at most the number of the others.

    Returns:
        bool `(T, E)` with `num_chosen` true entries in every column.
    """
    num_tokens, num_experts = ops.shape(score_TE)
    top = ops.full_like(score_TE, float("inf"))
    score_TE = ops.where(ops.isnan(score_TE), top, score_TE)
    if mask_T is not None:
        score_TE = ops.where(mask_T[:, None], score_TE, -top)
    _, token_EC = tf.math.top_k(ops.transpose(score_TE), most)
    expert_E1 = ops.arange(num_experts, dtype="int32")[:, None]
    index_EC = token_EC * num_experts + expert_E1
    taken_EC = ops.broadcast_to(
        ops.arange(most) < num_chosen, ops.shape(index_EC)
    )
    chosen = tf.scatter_nd(
        ops.reshape(index_EC, (-1, 1)),
        ops.reshape(ops.cast(taken_EC, "int32"), (-1,)),
        [num_tokens * num_experts],
    )
    return ops.reshape(chosen, (num_tokens, num_experts)) > 0


def group_mask(score_GTE, num_chosen_G, mask_GT=None):
    """`batchwise_mask` of each group of tokens by itself.

    Args:
        score_GTE: float.
        num_chosen_G: int or int32, `m` of each group.
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


def renormalised(logits_TE, chosen_TE):
    """Softmax over the chosen experts alone, equation 16.

    A token without an expert has zeros. From logits, since a softmax over
    all experts may leave nothing to divide by.
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


def of_chosen(weight_TE, chosen_TE, most):
    """`Gates` of a dense table in which tokens may differ in their experts.

    Args:
        weight_TE: float, gate values.
        chosen_TE: bool, which experts each token goes to.
        most: int or int32 scalar, the most experts of any token: `K`.

    Returns:
        `Gates`, each token's experts in their order.
    """
    num_experts = chosen_TE.shape[-1]
    # The largest of zeros and ones are the chosen ones, the first first.
    _, expert_TK = tf.math.top_k(ops.cast(chosen_TE, "int32"), most)
    used_TK = tf.gather(chosen_TE, expert_TK, batch_dims=1)
    weight_TK = entries(weight_TE, expert_TK)
    return Gates(
        ops.where(used_TK, weight_TK, ops.zeros_like(weight_TK)),
        ops.where(used_TK, expert_TK, ops.full_like(expert_TK, num_experts)),
    )


def load_probability(clean_TE, noisy_TE, std_TE, top):
    """Chance that an expert is chosen if only its noise is drawn again.

    Equations 8 and 9: the normal CDF of (clean logit - threshold) / noise
    deviation, where the threshold is the `k`-th largest *noisy* logit of the
    other experts. It is smooth in the logits of all experts, chosen or not.

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


def importance(gates, num_experts):
    """Sum of each expert's gate values over the batch, equation 6: `(E,)`."""
    return sum_by_expert(gates.weight_TK, gates.expert_TK, num_experts)


def assigned(gates, num_experts):
    """Number of tokens that chose each expert, float `(E,)`."""
    ones_TK = ops.ones_like(gates.weight_TK)
    return sum_by_expert(ones_TK, gates.expert_TK, num_experts)


def sum_by_expert(value, expert, num_experts):
    """Sums `value` over the entries of each expert: `(E, ...)`.

    Args:
        value: float, the shape of `expert` and any further axes.
        expert: int32; entries of `num_experts` count nowhere.
        num_experts: int, `E`.
    """
    if sharding.axes() is not None:
        return _sum_on_mesh(value, expert, num_experts)
    further = ops.shape(value)[len(expert.shape) :]
    # Entries that count nowhere make a last segment, which is cut.
    sums = ops.segment_sum(
        ops.reshape(value, (-1, *further)),
        ops.reshape(expert, (-1,)),
        num_segments=num_experts + 1,
    )
    return sums[:num_experts]


def _sum_on_mesh(value_TK, expert_TK, num_experts):
    """Sums that each device takes of its own tokens before they are added."""
    further = len(value_TK.shape) - len(expert_TK.shape)
    expert_TK = sorting.as_index(expert_TK)

    def column(j):
        hot_TE = ops.one_hot(expert_TK[:, j], num_experts, dtype=value_TK.dtype)
        for _ in range(further):
            hot_TE = hot_TE[..., None]
        return hot_TE * value_TK[:, j, None]

    columns = range(expert_TK.shape[1])
    return ops.sum(sum(column(j) for j in columns), axis=0)


def normal_cdf(z):
    """Cumulative distribution function of the standard normal."""
    return 0.5 * (1.0 + ops.erf(z / math.sqrt(2.0)))
