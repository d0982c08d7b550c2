"""Hypotheses of a decoder, and the penalties in GNMT's score."""

import typing

from keras import ops

from moe_tf.types import Tensor

# Without a lower limit, a position whose attention a float32 softmax rounds to
# zero would give a score of `-inf`.
_MIN_COVERAGE = 1e-10


class Hypotheses(typing.NamedTuple):
    """The `M` hypotheses of each of `B` sentences.

    A hypothesis ends with `end_id`, which its length, its log-probability,
    its attention and its score include. Where there are fewer than `M`, the
    rest have length 0, log-probability and score `-inf`. `I` is the length of
    the longest.

    Example:

    >>> hypotheses = moe_tf.decoding.Hypotheses(
    ...     np.array([[[7, 3], [3, 0]]]),
    ...     np.array([[2, 1]]),
    ...     np.array([[-0.7, -1.6]]),
    ...     np.array([[-0.7, -1.6]]),
    ... )
    >>> [
    ...     tokens[:length].tolist()
    ...     for tokens, length in zip(
    ...         hypotheses.tokens_BMI[0], hypotheses.lengths_BM[0]
    ...     )
    ... ]
    [[7, 3], [3]]

    Attributes:
        tokens_BMI: int32, without `start_id`; 0 past the length.
        lengths_BM: int32.
        scores_BM: float32.
        log_probabilities_BM: float32, natural logarithm of the probability
            that the model gives to the tokens, before any penalty.
        attention_BMIS: float32, over the source as each token was chosen;
            0 past the length. `None` if it was not asked for.
    """

    tokens_BMI: Tensor
    lengths_BM: Tensor
    scores_BM: Tensor
    log_probabilities_BM: Tensor
    attention_BMIS: Tensor | None = None


def length_penalty(length: Tensor | int, weight: float) -> Tensor:
    """Computes GNMT's `lp(Y) = ((5 + |Y|) / (5 + 1)) ** weight`.

    Example:

    >>> moe_tf.decoding.length_penalty(np.array([1, 7, 19]), 1.0).numpy()
    array([1., 2., 4.], dtype=float32)

    Args:
        length: int, any shape, numbers of tokens, `end_id` included.
        weight: float, GNMT's alpha.

    Returns:
        float32 of the same shape, by which log-probabilities are divided.

    Reference:
     - [Wu et al., 2016](https://arxiv.org/abs/1609.08144), equation 14
    """
    return ((5.0 + ops.cast(length, "float32")) / 6.0) ** weight


def coverage_penalty(
    coverage_BMS: Tensor, source_mask_BS: Tensor, weight: float
) -> Tensor:
    """Computes GNMT's `cp(X; Y) = weight * sum_i log(min(sum_j p_ij, 1))`.

    The penalty is 0 if every source position got attention of 1 in total, and
    negative otherwise. Coverage below 1e-10 counts as 1e-10, so that the
    penalty is finite where attention underflows.

    Example:

    >>> coverage = np.array([[[1.0, 1.0], [1.0, 0.5]]], "float32")
    >>> mask = np.array([[True, True]])
    >>> moe_tf.decoding.coverage_penalty(coverage, mask, 0.2).numpy().round(3)
    array([[ 0.   , -0.139]], dtype=float32)

    Args:
        coverage_BMS: float32, attention summed over the target, `sum_j p_ij`.
        source_mask_BS: bool; `False` marks padding, which does not count.
        weight: float.

    Returns:
        float32 `(B, M)`, to be added to a score.

    Reference:
     - [Wu et al., 2016](https://arxiv.org/abs/1609.08144), equation 14
    """
    covered_BMS = ops.clip(coverage_BMS, _MIN_COVERAGE, 1.0)
    log_BMS = ops.where(source_mask_BS[:, None], ops.log(covered_BMS), 0.0)
    return weight * ops.sum(log_BMS, axis=-1)
