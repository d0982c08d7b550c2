"""Translation of many sentences: sorted into batches, returned in order."""

import dataclasses
import itertools
from collections.abc import Iterable
from collections.abc import Iterator

import numpy as np

from moe_tf import special_ids
from moe_tf.data import lines
from moe_tf.data.parallel import batch_plan
from moe_tf.models.translation.translator import Translator

# Batches that are read ahead and sorted by length, for less padding.
_BATCHES_AHEAD = 16

TOO_LONG = lines.TOO_LONG

# No line has so long wordpieces on average: a line of more bytes than this
# times the limit is too long, and need not be split into wordpieces.
_MAX_BYTES_PER_PIECE = 64


@dataclasses.dataclass(frozen=True)
class Translation:
    """One translation of a sentence.

    Attributes:
        text: the translation.
        score: float, what the decoder ranks by.
        log_probability: float, in nats, the end counted.
        source_pieces: what the encoder read.
        pieces: what the decoder wrote, without the end.
        attention: float `(len(pieces) + 1, len(source_pieces))`, each row of
            sum 1; the last is that of the end. `None` from sampling.
    """

    text: str
    score: float
    log_probability: float
    source_pieces: list[str]
    pieces: list[str]
    attention: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Translated:
    """The translations of one line, or the reason why there are none.

    Attributes:
        translations: the best first; empty for a line that was skipped.
        skipped: why the line was skipped; `None` if it was not.
    """

    translations: list[Translation]
    skipped: str | None = None


def translate_lines(
    translator: Translator,
    raw_lines: Iterable[bytes | None],
    language: str | None,
    batch_size: int,
    max_pieces: int,
) -> Iterator[Translated]:
    """Translates lines of any number, in order, one `Translated` each.

    Reads 16 batches ahead. A line that is blank, not UTF-8 or too long is
    skipped, and the others go on.

    Args:
        translator: `models.translator.Translator`.
        raw_lines: as `lines.bounded_lines` gives them.
        language: see `Translator`.
        batch_size: sentences translated together.
        max_pieces: longer sources are skipped.
    """
    raw_lines = iter(raw_lines)
    while chunk := list(
        itertools.islice(raw_lines, batch_size * _BATCHES_AHEAD)
    ):
        reasons = [_why_unusable(raw, max_pieces) for raw in chunk]
        usable = [i for i, reason in enumerate(reasons) if reason is None]
        if usable:
            texts = [chunk[i].strip() for i in usable]
            rows = translator.encode_ragged(texts, language).to_list()
            for i, row in zip(usable, rows, strict=True):
                if len(row) > max_pieces:
                    reasons[i] = TOO_LONG
            fit = [
                (i, row)
                for i, row in zip(usable, rows, strict=True)
                if reasons[i] is None
            ]
            by_index = dict(_in_batches(translator, fit, batch_size))
        for i, reason in enumerate(reasons):
            yield Translated([], reason) if reason else Translated(by_index[i])


def _why_unusable(raw, max_pieces):
    if raw is not None and len(raw) > max_pieces * _MAX_BYTES_PER_PIECE:
        return TOO_LONG
    return lines.reason_to_skip(raw, lines.MAX_LINE_BYTES)


def translate_texts(
    translator: Translator,
    texts: list[str],
    language: str | None,
    batch_size: int,
) -> list[str]:
    """Returns the best translation of each text, whatever its length.

    Args:
        translator: `models.translator.Translator`.
        texts: list of str.
        language: see `Translator`.
        batch_size: sentences translated together.
    """
    rows = translator.encode_ragged(texts, language).to_list()
    by_index = dict(_in_batches(translator, enumerate(rows), batch_size))
    return [
        by_index[i][0].text if by_index[i] else "" for i in range(len(texts))
    ]


def format_example(source: str, translation: str, reference: str) -> str:
    """Formats a translation for a reader, in three lines."""
    return (
        f"source:      {source}\n"
        f"translation: {translation}\n"
        f"reference:   {reference}"
    )


def _in_batches(translator, numbered_rows, batch_size):
    """`(number, translations)` of sources of ids, batched by length."""
    ordered = sorted(numbered_rows, key=lambda row: len(row[1]))
    for first in range(0, len(ordered), batch_size):
        batch = ordered[first : first + batch_size]
        source_BS = _padded([row for _, row in batch], batch_size)
        hypotheses = translator.translate_ids(source_BS)
        strings = translator.decode(hypotheses)
        texts_BM = strings["translation"].numpy()
        arrays = [None if x is None else x.numpy() for x in hypotheses]
        for b, (number, row) in enumerate(batch):
            own = [None if array is None else array[b] for array in arrays]
            yield number, list(_translations(translator, row, texts_BM[b], own))


def _padded(rows, num_rows):
    """The rows as one array; empty ones fill it up to `num_rows`."""
    length = batch_plan.padded_length(max(map(len, rows)))
    source_BS = np.full((num_rows, length), special_ids.PAD, "int32")
    for b, row in enumerate(rows):
        source_BS[b, : len(row)] = row
    return source_BS


def _translations(translator, row, texts_M, hypotheses):
    tokens_MI, lengths_M, scores_M, log_probabilities_M, attention_MIS = (
        hypotheses
    )
    pieces = translator.wordpieces.pieces
    for m, length in enumerate(lengths_M):
        if not length:
            return  # pruned, and so are the ones after it
        ids = tokens_MI[m, :length]
        attention = None
        if attention_MIS is not None:
            attention = attention_MIS[m, :length, : len(row)]
        yield Translation(
            text=texts_M[m].decode("utf-8", "replace"),
            score=float(scores_M[m]),
            log_probability=float(log_probabilities_M[m]),
            source_pieces=[pieces[i] for i in row],
            pieces=[pieces[i] for i in ids if i != special_ids.END],
            attention=attention,
        )
