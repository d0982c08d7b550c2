"""Translations that a decoder has found, and GNMT's score of them."""

import typing

from keras import ops

# A source position without any attention would cost everything; float32
# softmax rounds what is far below its best to zero.
_LEAST_COVERAGE = 1e-10


class Hypotheses(typing.NamedTuple):
    """The `M` hypotheses of each of `B` sentences.

    A hypothesis ends with `end_id`, which its length, its log-probability,
    its attention and its score include. Where there are fewer than `M`, the
    rest have length 0, log-probability and score `-inf`. `I` is the length of
    the longest.

    Attributes:
        tokens_BMI: int32, without `start_id`; 0 past the length.
        lengths_BM: int32.
        scores_BM: float32.
        log_probabilities_BM: float32, natural logarithm of the probability
            that the model gives to the tokens, before any penalty.
        attention_BMIS: float32, over the source as each token was chosen;
            0 past the length. `None` if it was not asked for.
    """

    tokens_BMI: typing.Any
    lengths_BM: typing.Any
    scores_BM: typing.Any
    log_probabilities_BM: typing.Any
    attention_BMIS: typing.Any = None


def length_penalty(length, weight):
    """GNMT's `lp(Y) = ((5 + |Y|) / (5 + 1)) ** weight`, float32.

    Log-probabilities are divided by it. `length` counts `end_id`.
    """
    return ((5.0 + ops.cast(length, "float32")) / 6.0) ** weight


def coverage_penalty(coverage_BMS, source_mask_BS, weight):
    """GNMT's `cp(X; Y) = weight * sum_i log(min(sum_j p_ij, 1))`.

    0 where every source position got attention of 1 in all, otherwise below.
    A position counts as covered by 1e-10 at least, so that the penalty is
    finite where attention underflows.

    Args:
        coverage_BMS: float32, attention summed over the target, `sum_j p_ij`.
        source_mask_BS: bool; `False` marks padding, which does not count.
        weight: float.

    Returns:
        float32 `(B, M)`, to be added to a score.
    """
    covered_BMS = ops.clip(coverage_BMS, _LEAST_COVERAGE, 1.0)
    log_BMS = ops.where(source_mask_BS[:, None], ops.log(covered_BMS), 0.0)
    return weight * ops.sum(log_BMS, axis=-1)
