"""Log-probabilities of sentences under a language model."""

import dataclasses
import itertools
from collections.abc import Callable
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from moe_tf import special_ids
from moe_tf.data import lines
from moe_tf.data.text import preparation

LINES_AT_ONCE = 64


@dataclasses.dataclass(frozen=True)
class Scored:
    """The score of one line, or the reason why there is none.

    Attributes:
        log_probability: float, in nats, the end of the sentence included.
        words: int, the end of the sentence counted.
        unknown: int, words that are not in the vocabulary.
        skipped: str, why the line has no score; `None` if it has a score.
    """

    log_probability: float = 0.0
    words: int = 0
    unknown: int = 0
    skipped: str | None = None


def score_lines(
    score: Callable, prepared: preparation.PreparedText, file: BinaryIO
) -> Iterator[Scored]:
    """Scores sentences in order, one `Scored` for each line.

    Reads 64 lines ahead.

    Args:
        score: function of up to 64 sentences and `prepared` to their batch,
            see `batching.encode`, and the negative log-likelihoods in it.
        prepared: the `PreparedText` that the model was trained on.
        file: binary file of sentences, one a line, of any length.
    """
    raw_lines = lines.bounded_lines(file)
    max_words = prepared.corpus.max_words
    while chunk := list(itertools.islice(raw_lines, LINES_AT_ONCE)):
        reasons = [lines.reason_to_skip(raw, max_words) for raw in chunk]
        usable = [
            raw
            for raw, reason in zip(chunk, reasons, strict=True)
            if reason is None
        ]
        scores = iter(_score(score, prepared, usable) if usable else [])
        for reason in reasons:
            yield Scored(skipped=reason) if reason else next(scores)


def _score(score, prepared, sentences):
    (_, targets_BL, weights_BL), nll_BL = score(sentences, prepared)
    nll_BL = np.asarray(nll_BL * weights_BL, "float64")
    unknown_BL = np.asarray(targets_BL) == special_ids.UNK
    for nll_L, weights_L, unknown_L in zip(
        nll_BL, np.asarray(weights_BL), unknown_BL, strict=True
    ):
        yield Scored(
            -float(nll_L.sum()), int(weights_L.sum()), int(unknown_L.sum())
        )
