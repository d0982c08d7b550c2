"""The balancing losses of routers: equations 7, 11 and 20, and later ones."""

from keras import ops

from moe_tf.types import Tensor

__all__ = [
    "batchwise_loss",
    "cv_squared",
    "importance_loss",
    "load_balance_loss",
    "load_loss",
    "z_loss",
]


def __dir__() -> list[str]:
    return __all__


def cv_squared(x: Tensor) -> Tensor:
    """Computes the squared coefficient of variation, variance / mean^2.

    0 when all entries are equal, `n - 1` when one of `n` entries holds
    everything. The variance is that of the population. An all-zero `x` (a
    batch without a single unmasked token) gives 0, not NaN.

    Args:
        x: float tensor of any shape.

    Returns:
        A scalar of the dtype of `x`.

    Example:

    >>> print(f"{float(moe_tf.losses.cv_squared(np.array([1.0, 3.0]))):.4f}")
    0.2500
    """
    mean = ops.mean(x)
    variance = ops.mean(ops.square(x - mean))
    return variance / (ops.square(mean) + 1e-10)


def importance_loss(importance_E: Tensor) -> Tensor:
    """Computes the importance loss, `CV(Importance(X))^2` of equation 7.

    The weight `w_importance` of the equation is the router's
    `importance_weight`.

    Args:
        importance_E: float, sum of each expert's gate values over the batch,
            equation 6.

    Returns:
        A scalar, 0 when all experts are equally important.

    Example:

    >>> importance_E = np.array([2.0, 2.0, 2.0])
    >>> float(moe_tf.losses.importance_loss(importance_E))
    0.0

    Reference:
     - [Shazeer et al., 2017](https://arxiv.org/abs/1701.06538), section 4
    """
    return cv_squared(importance_E)


def load_loss(load_E: Tensor) -> Tensor:
    """Computes the load loss, `CV(Load(X))^2` of equation 11.

    The weight `w_load` of the equation is the router's `load_weight`.

    Args:
        load_E: float, number of tokens that each expert is expected to
            receive, equation 10. A plain count has no gradient.

    Returns:
        A scalar, 0 when all experts have the same load.

    Example:

    >>> print(f"{float(moe_tf.losses.load_loss(np.array([4.0, 0.0]))):.4f}")
    1.0000

    Reference:
     - [Shazeer et al., 2017](https://arxiv.org/abs/1701.06538), appendix A
    """
    return cv_squared(load_E)


def z_loss(logits_TE: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """Computes the router z-loss, `mean_T (log sum_E exp logits)^2`.

    The loss keeps logits small, where float32 represents them precisely.

    Args:
        logits_TE: float.
        mask_T: optional bool; masked tokens are left out of the mean.

    Returns:
        A scalar, 0 for a batch without an unmasked token.

    Example:

    >>> print(f"{float(moe_tf.losses.z_loss(np.zeros((5, 4)))):.4f}")
    1.9218

    Reference:
     - [Zoph et al., 2022](https://arxiv.org/abs/2202.08906), ST-MoE,
       equation 5
    """
    square_T = ops.square(ops.logsumexp(logits_TE, axis=-1))
    return _mean(square_T, mask_T)


def load_balance_loss(
    probability_TE: Tensor, load_E: Tensor, mask_T: Tensor | None = None
) -> Tensor:
    """Computes `n sum_i f_i P_i - 1`, the balance loss of GShard and Switch.

    `f_i` is the fraction of the assignments that go to expert `i`, a count
    without a gradient, and `P_i` the mean of its probability over the tokens.

    Args:
        probability_TE: float, softmax over all experts.
        load_E: float, number of assignments of each expert.
        mask_T: optional bool; masked tokens are left out of the means.

    Returns:
        A scalar. 0 where all `f` or all `P` are equal, and `n - 1` when one
        expert has everything. The `1` that is subtracted is the value of the
        sum at perfect balance; the original papers keep it.

    Example:

    >>> probability_TE = np.array([[0.9, 0.1], [0.8, 0.2]])
    >>> load_E = np.array([2.0, 0.0])
    >>> loss = moe_tf.losses.load_balance_loss(probability_TE, load_E)
    >>> print(f"{float(loss):.4f}")
    0.7000

    Reference:
     - [Lepikhin et al., 2020](https://arxiv.org/abs/2006.16668), GShard
     - [Fedus et al., 2021](https://arxiv.org/abs/2101.03961), Switch
       Transformers, equation 4
    """
    num_experts = probability_TE.shape[-1]
    total = ops.maximum(ops.sum(load_E), 1.0)
    fraction_E = ops.stop_gradient(load_E / total)
    mean_E = _mean(probability_TE, mask_T)
    at_balance = ops.cast(ops.sum(load_E) > 0, mean_E.dtype)
    return num_experts * ops.sum(fraction_E * mean_E) - at_balance


def batchwise_loss(
    score_TE: Tensor,
    threshold_E: Tensor,
    chosen_TE: Tensor,
    mask_T: Tensor | None = None,
) -> Tensor:
    """Computes the threshold loss of strictly balanced gating, equation 20.

    `sum_TE (passes_TE - chosen_TE) (score_TE - threshold_E)`, where `passes`
    is 1 for a score above the threshold (equation 19) and `chosen` is 1 for a
    token that the batch chose (equation 18). 0 where both are the same. The
    derivative with respect to a threshold is the number of tokens that the
    batch chose, less the number of tokens that pass. The scores get no
    gradient: thresholds learn from the gate, not the gate from thresholds.

    Args:
        score_TE: float, softmax over the experts; all tensors may have more
            leading axes.
        threshold_E: float.
        chosen_TE: bool, from `gating.batchwise_mask`.
        mask_T: optional bool; masked tokens are left out.

    Returns:
        A scalar of at least 0.

    Example:

    >>> loss = moe_tf.losses.batchwise_loss(
    ...     np.array([[0.75, 0.25], [0.5, 0.5]]),
    ...     threshold_E=np.array([0.25, 0.25]),
    ...     chosen_TE=np.array([[True, False], [False, True]]),
    ... )
    >>> float(loss)  # 0.5 - 0.25: a token passes that is not chosen
    0.25

    Reference:
     - [Shazeer et al., 2017](https://arxiv.org/abs/1701.06538), appendix F
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
        count = ops.cast(ops.shape(value)[0], value.dtype)
        return ops.sum(value, axis=0) / ops.maximum(count, 1.0)
    keep_T = ops.cast(mask_T, value.dtype)
    count = ops.maximum(ops.sum(keep_T), 1.0)
    return ops.tensordot(keep_T, value, axes=1) / count
