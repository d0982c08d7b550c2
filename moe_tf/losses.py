"""The balancing losses of routers: equations 7, 11 and 20, and later ones."""

from keras import ops

__all__ = [
    "batchwise_loss",
    "cv_squared",
    "load_balance_loss",
    "z_loss",
]


def __dir__() -> list[str]:
    return __all__


def cv_squared(x):
    """Squared coefficient of variation, variance / mean^2, over all of `x`.

    0 when all entries are equal, `n - 1` when one of `n` entries holds
    everything. The variance is that of the population. An all-zero `x` (a
    batch without a single real token) gives 0, not NaN.

    Args:
        x: float tensor of any shape.

    Returns:
        A scalar of the dtype of `x`.
    """
    mean = ops.mean(x)
    variance = ops.mean(ops.square(x - mean))
    return variance / (ops.square(mean) + 1e-10)


def z_loss(logits_TE, mask_T=None):
    """Mean over tokens of the squared log of the softmax's denominator.

    It keeps logits small, where float32 tells them apart (Zoph et al., 2022,
    ST-MoE, equation 5). 0 for a batch without a real token.
    """
    square_T = ops.square(ops.logsumexp(logits_TE, axis=-1))
    return _mean(square_T, mask_T)


def load_balance_loss(probability_TE, load_E, mask_T=None):
    """`n sum_i f_i P_i - 1`, the balance loss of GShard and Switch.

    `f_i` is expert i's share of the assignments, a count without a gradient,
    and `P_i` the mean of its softmax over the tokens. It is 0 where all `f`
    or all `P` are alike, and `n - 1` when one expert holds everything.

    Args:
        probability_TE: float, softmax over all experts.
        load_E: float, number of assignments of each expert.
        mask_T: optional bool.
    """
    num_experts = probability_TE.shape[-1]
    total = ops.maximum(ops.sum(load_E), 1.0)
    fraction_E = ops.stop_gradient(load_E / total)
    mean_E = _mean(probability_TE, mask_T)
    some = ops.cast(ops.sum(load_E) > 0, mean_E.dtype)
    return num_experts * ops.sum(fraction_E * mean_E) - some


def batchwise_loss(score_TE, threshold_E, chosen_TE, mask_T=None):
    """What trains the thresholds of strictly balanced gating, equation 20.

    Zero where threshold and batch choose the same tokens; its derivative with
    respect to a threshold is the number of tokens that the batch chose less
    the number of those that pass the threshold. The scores get no gradient:
    the thresholds learn from the gate, not the gate from the thresholds.

    Args:
        score_TE: float, softmax over the experts; all may have more leading
            axes.
        threshold_E: float.
        chosen_TE: bool, `batchwise_mask(score_TE, ...)`.
        mask_T: optional bool; masked tokens count nowhere.
    """
    excess_TE = ops.stop_gradient(score_TE) - threshold_E
    passes_TE = excess_TE > 0
    if mask_T is not None:
        passes_TE = ops.logical_and(passes_TE, mask_T[..., None])
        chosen_TE = ops.logical_and(chosen_TE, mask_T[..., None])
    wrong_TE = ops.cast(passes_TE, excess_TE.dtype) - ops.cast(
        chosen_TE, excess_TE.dtype
    )
    return ops.sum(ops.stop_gradient(wrong_TE) * excess_TE)


def _mean(value, mask_T):
    """Mean over the tokens that are not masked; 0 if there are none."""
    if mask_T is None:
        number = ops.cast(ops.shape(value)[0], value.dtype)
        return ops.sum(value, axis=0) / ops.maximum(number, 1.0)
    keep_T = ops.cast(mask_T, value.dtype)
    number = ops.maximum(ops.sum(keep_T), 1.0)
    return ops.tensordot(keep_T, value, axes=1) / number
