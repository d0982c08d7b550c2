"""Batches of sentence pairs of similar length, in a seeded order."""

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
    """Returns the number of batches of an evaluation pass; see `batches`."""
    plan = batch_plan.BatchPlan(
        prepared, split, batch_tokens, pair, rows_multiple
    )
    return plan.num_batches(plan.all_indices)


def batches_in_first_pass(
    prepared: preparation.PreparedPairs,
    batch_tokens: int,
    seed: int = 0,
    *,
    rows_multiple: int | None = None,
) -> int:
    """Returns the number of batches of the first training pass.

    All passes have the same number if `data.pairs` has no weights.
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
    """Makes the batches of a translation model.

    A batch holds pairs of similar length, padded to the length
    (`batch_plan.padded_length`) of the longer side, in `batch_tokens //
    length` rows. All batches of one length have the same number of rows, so
    the number of shapes is the number of lengths. Where pairs run out, the
    last rows are all padding, with weights of 0.

    Training is an endless stream of passes, each with as many pairs as the
    split. Where `data.pairs` has weights, each language pair has its fraction
    of every pass, and repeats no sentence before all have been used. Batch `i`
    of the stream depends on `seed` and `i` alone: `start_step` resumes
    exactly, in this process or another. Evaluation is one pass from short to
    long, with every pair once.

    Args:
        prepared: `PreparedPairs`.
        split: `"train"`, `"validation"` or `"test"`.
        batch_tokens: int, maximal positions of one side in a batch; a batch
            of a single pair may be longer. With a multiple of 384 all batches
            of up to 128 positions are full.
        seed: int, not negative; for training.
        start_step: int, number of batches to skip; for training.
        pair: optional name of the one language pair to read.
        rows_multiple: optional int that divides the number of rows of each
            batch, for a mesh or token groups. A batch may then exceed
            `batch_tokens`.
        training: bool. Defaults to whether `split` is `"train"`.

    Returns:
        A dataset of `(inputs, targets, weights)`. `inputs` is a dictionary
        of int32 `(B, L)`, padded with 0: `source` is the symbol of the target
        language, if there are several, the pieces and `</S>`; `tokens` is
        `<S>` and the pieces of the target; `targets` is the pieces of the
        target and `</S>`. The dataset's `targets` equals the one in `inputs`.
        `weights` is float32 `(B, L)`, 1 where `targets` is not padding.

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
        planned = functools.partial(plan.training_batches, seed, start_step)
    else:
        planned = plan.evaluation_batches
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


def encode_pairs(
    prepared: preparation.PreparedPairs,
    sources: Sequence[bytes | str],
    targets: Sequence[bytes | str],
    language: str | None = None,
    num_rows: int | None = None,
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Makes one batch of given sentence pairs, in their order.

    Args:
        prepared: `PreparedPairs`.
        sources: sentences, at least one.
        targets: sentences, one for each source.
        language: language of the targets; optional if there is only one.
        num_rows: optional int, number of rows, at least the number of
            sentences. Further rows are all padding.

    Returns:
        `(inputs, targets, weights)`, as `batches` has them.

    Raises:
        ValueError: the language is not one of `data.pairs`, or `targets` has
            another length than `sources`.
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
    """Makes the arrays of a planned batch."""
    shape = (batch.num_rows, batch.length)
    source, tokens, targets = (
        np.full(shape, special_ids.PAD, np.int32) for _ in range(3)
    )
    for place, rows, within in plan.by_language_pair(batch.indices):
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
    """Copies `ids[offset : offset + length]` to rows, from a column on."""
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
    checks.at_least("num_rows", num_rows, len(rows), allow_none=True)
    padded = np.full((num_rows or len(rows), length), special_ids.PAD, np.int32)
    for row, to in zip(rows, padded, strict=False):
        to[: len(row)] = row
    return padded
