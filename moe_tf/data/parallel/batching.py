"""Batches of sentence pairs of similar length, in an order fixed by a seed."""

import functools
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from moe_tf import checks
from moe_tf import special_ids
from moe_tf.data.parallel import batch_plan
from moe_tf.data.parallel import preparation


def num_batches(
    prepared: preparation.PreparedPairs,
    split: str,
    batch_tokens: int,
    *,
    pair: str | None = None,
    rows_multiple: int | None = None,
) -> int:
    """Number of batches of one pass for evaluation; see `batches`."""
    plan = batch_plan.BatchPlan(
        prepared, split, batch_tokens, pair, rows_multiple
    )
    return plan.num_batches(plan.all)


def batches_in_first_pass(
    prepared: preparation.PreparedPairs,
    batch_tokens: int,
    seed: int = 0,
    *,
    rows_multiple: int | None = None,
) -> int:
    """Number of batches of the first pass of training; see `batches`.

    Without weights in `data.pairs`, all passes have as many.
    """
    plan = batch_plan.BatchPlan(
        prepared, "train", batch_tokens, None, rows_multiple
    )
    return plan.num_batches(plan.pairs_of_pass(seed, 0))


def batches(
    prepared: preparation.PreparedPairs,
    split: str,
    batch_tokens: int,
    seed: int = 0,
    start_step: int = 0,
    *,
    pair: str | None = None,
    rows_multiple: int | None = None,
    training: bool | None = None,
) -> tf.data.Dataset:
    """Batches for a translation model.

    Pairs of similar length make a batch: it is padded to the length
    (`batch_plan.padded_length`) of the longer side, and has `batch_tokens //
    length` rows. All batches of one length have equally many rows, so there
    are as many shapes as lengths; where pairs run out, the last rows are
    all padding, with weights of 0.

    Training is an endless stream of passes, each of as many pairs as the
    split has. Where `data.pairs` has weights, a language pair has its share
    of every pass, and goes through all of its sentences before any comes
    again. Batch `i` of the stream is a function of `seed` and `i` alone:
    `start_step` resumes exactly, in this process or another. Evaluation is
    one pass from short to long, with every pair once.

    Args:
        prepared: see `pairs.prepare`.
        split: `"train"`, `"validation"` or `"test"`.
        batch_tokens: int, most positions of one side in a batch; a batch of
            a single pair may be longer. With a multiple of 384 all batches
            of up to 128 positions are full.
        seed: int, not negative; for training.
        start_step: int, number of batches to leave out; for training.
        pair: optional name of the one language pair to read.
        rows_multiple: optional int, by which the number of rows of each
            batch can be divided, for a mesh or groups of tokens; a batch
            then may hold as many that are longer than `batch_tokens`.
        training: bool. Defaults to whether `split` is `"train"`.

    Returns:
        A dataset of `(inputs, targets, weights)`. `inputs` is a dictionary
        of int32 `(B, L)`: `source` is the symbol of the target language, if
        there are several, the pieces and `</S>`; `tokens` is `<S>` and the
        pieces of the target; `targets` those pieces and `</S>`. All are
        padded with 0. `targets` is the same again. `weights` is float32
        `(B, L)`, 1 where `targets` is not padding.

    Raises:
        ValueError: an argument cannot be used.
    """
    training = split == "train" if training is None else training
    checks.at_least("seed", seed, 0)
    checks.at_least("start_step", start_step, 0)
    if start_step and not training:
        raise ValueError(
            f"`start_step` must be 0 without `training`. Received: {start_step}"
        )
    plan = batch_plan.BatchPlan(
        prepared, split, batch_tokens, pair, rows_multiple
    )
    if training:
        planned = functools.partial(plan.training, seed, start_step)
    else:
        planned = plan.evaluation
    ids = tf.TensorSpec((None, None), tf.int32)
    names = ("source", "tokens", "targets")
    dataset = tf.data.Dataset.from_generator(
        lambda: (_read(plan, batch) for batch in planned()),
        output_signature=(
            dict.fromkeys(names, ids),
            ids,
            tf.TensorSpec((None, None), tf.float32),
        ),
    )
    return dataset.prefetch(2)


def encode_sources(
    prepared: preparation.PreparedPairs,
    texts: Sequence[bytes | str],
    language: str | None = None,
    num_rows: int | None = None,
) -> np.ndarray:
    """What a model reads to translate given sentences, in their order.

    Args:
        prepared: see `pairs.prepare`.
        texts: sentences, at least one.
        language: the target language; may be left out if there is one.
        num_rows: optional int, not below the number of sentences: as many
            rows are there, the last all padding.

    Returns:
        int32 `(B, S)`, padded as `batches` does.

    Raises:
        ValueError: the language is not one of `data.pairs`.
    """
    rows = _sources(prepared, texts, language)
    length = batch_plan.padded_length(max(map(len, rows)))
    return _padded(rows, num_rows, length)


def encode_pairs(
    prepared: preparation.PreparedPairs,
    sources: Sequence[bytes | str],
    targets: Sequence[bytes | str],
    language: str | None = None,
    num_rows: int | None = None,
):
    """One batch of given sentence pairs, in their order; see `batches`.

    Args:
        prepared: see `pairs.prepare`.
        sources: sentences, at least one.
        targets: as many sentences.
        language: the targets' language; may be left out if there is one.
        num_rows: optional int, not below the number of sentences: as many
            rows are there, the last all padding.

    Raises:
        ValueError: the language is not one of `data.pairs`, or there are
            not as many targets as sources.
    """
    if len(sources) != len(targets):
        raise ValueError(
            "`sources` and `targets` must be equally many. Received: "
            f"{len(sources)} and {len(targets)}"
        )
    source_rows = _sources(prepared, sources, language)
    pieces = _pieces(prepared, targets)
    longest = max(max(map(len, source_rows)), 1 + max(map(len, pieces)))
    length = batch_plan.padded_length(longest)
    return _batch(
        _padded(source_rows, num_rows, length),
        _padded(
            [[special_ids.START, *row] for row in pieces], num_rows, length
        ),
        _padded([[*row, special_ids.END] for row in pieces], num_rows, length),
    )


def _read(plan, batch: batch_plan.PlannedBatch):
    """The arrays of a batch."""
    shape = (batch.num_rows, batch.length)
    source, tokens, targets = (
        np.full(shape, special_ids.PAD, np.int32) for _ in range(3)
    )
    for place, rows, within in plan.by_language_pair(batch.numbers):
        store, prefix = plan.stores[place], plan.prefixes[place]
        offsets = store.offsets[within]
        source_lengths, target_lengths = store.lengths[within].T
        source[rows, : len(prefix)] = prefix
        _copy(store.ids, offsets, source_lengths, source, rows, len(prefix))
        source[rows, source_lengths + len(prefix)] = special_ids.END
        offsets = offsets + source_lengths
        tokens[rows, 0] = special_ids.START
        _copy(store.ids, offsets, target_lengths, tokens, rows, 1)
        _copy(store.ids, offsets, target_lengths, targets, rows, 0)
        targets[rows, target_lengths] = special_ids.END
    return _batch(source, tokens, targets)


def _copy(ids, offsets, lengths, to, rows, column):
    """Writes `ids[offset : offset + length]` into rows, from a column on."""
    ends = np.cumsum(lengths)
    steps = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    pieces = ids[np.repeat(offsets, lengths) + steps]
    to[np.repeat(rows, lengths), steps + column] = pieces


def _batch(source, tokens, targets):
    inputs = {"source": source, "tokens": tokens, "targets": targets}
    return inputs, targets, (targets != special_ids.PAD).astype(np.float32)


def _sources(prepared, texts, language):
    prefix = prepared.source_prefix(language)
    return [
        [*prefix, *row, special_ids.END] for row in _pieces(prepared, texts)
    ]


def _pieces(prepared, texts):
    if not len(texts):
        raise ValueError("There must be at least one sentence. Received: none")
    return prepared.wordpieces.encode(texts).to_list()


def _padded(rows, num_rows, length):
    checks.at_least("num_rows", num_rows, len(rows), none_is_fine=True)
    padded = np.full((num_rows or len(rows), length), special_ids.PAD, np.int32)
    for row, to in zip(rows, padded, strict=False):
        to[: len(row)] = row
    return padded
