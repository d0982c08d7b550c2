"""Log-probabilities of given translations."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable
from collections.abc import Iterator

import numpy as np

from moe_tf import special_ids
from moe_tf.data import lines
from moe_tf.data.parallel import batching
from moe_tf.data.parallel import preparation
from moe_tf.models.translation.scorer import TranslationScorer

NO_TAB = "no_tab_between_source_and_target"


@dataclasses.dataclass(frozen=True)
class ScoredPair:
    """The score of one line, or the reason why there is none.

    Attributes:
        log_probability: float, of the target given the source, in nats, its
            end included.
        pieces: int, wordpieces of the target, its end counted.
        skipped: str, why the line has no score; `None` if it has a score.
    """

    log_probability: float = 0.0
    pieces: int = 0
    skipped: str | None = None


def score_lines(
    scorer: TranslationScorer,
    prepared: preparation.PreparedPairs,
    raw_lines: Iterable[bytes | None],
    language: str | None,
    batch_size: int,
    max_pieces: int,
) -> Iterator[ScoredPair]:
    """Scores lines `source<TAB>target` in order, one `ScoredPair` each.

    Args:
        scorer: `TranslationScorer`.
        prepared: the `PreparedPairs` that the model was trained on.
        raw_lines: as `lines.bounded_lines` gives them.
        language: see `Translator`.
        batch_size: lines scored together.
        max_pieces: lines of which a side has more are skipped.
    """
    raw_lines = iter(raw_lines)
    encode = functools.partial(
        _encode, prepared, language=language, num_rows=batch_size
    )
    while chunk := list(itertools.islice(raw_lines, batch_size)):
        sides = [_sides(raw) for raw in chunk]
        reasons = [side if isinstance(side, str) else None for side in sides]
        usable = [i for i, reason in enumerate(reasons) if reason is None]
        if usable:
            pieces = _longer_side(encode([sides[i] for i in usable]))
            for i, number in zip(usable, pieces, strict=False):
                if number > max_pieces:
                    reasons[i] = lines.TOO_LONG
        usable = [i for i in usable if reasons[i] is None]
        scored = iter(())
        if usable:
            scored = _score(scorer, encode([sides[i] for i in usable]))
        for reason in reasons:
            yield ScoredPair(skipped=reason) if reason else next(scored)


def _sides(raw):
    """Source and target of a line, or why it cannot be scored."""
    if reason := lines.reason_to_skip(raw, lines.MAX_LINE_BYTES):
        return reason
    source, tab, target = raw.strip(b"\r\n").partition(b"\t")
    if not tab:
        return NO_TAB
    if not source.strip() or not target.strip():
        return lines.BLANK
    return source.strip(), target.strip()


def _encode(prepared, sides, language, num_rows):
    sources, targets = zip(*sides, strict=True)
    return batching.encode_pairs(prepared, sources, targets, language, num_rows)


def _longer_side(batch):
    """Wordpieces of the longer side of each row, ends counted."""
    inputs, targets_BL, _ = batch
    return np.maximum(
        (np.asarray(inputs["source"]) != special_ids.PAD).sum(axis=1),
        (np.asarray(targets_BL) != special_ids.PAD).sum(axis=1),
    )


def _score(scorer, batch):
    inputs, _, weights_BL = batch
    weights_BL = np.asarray(weights_BL)
    nll_BL = np.asarray(scorer(inputs)[..., 0], "float64") * weights_BL
    for nll_L, weights_L in zip(nll_BL, weights_BL, strict=True):
        if weights_L.any():
            yield ScoredPair(-float(nll_L.sum()), int(weights_L.sum()))
