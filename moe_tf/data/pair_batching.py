"""Batches of sentence pairs of similar length, in an order fixed by a seed."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from moe_tf import checks
from moe_tf.data import corpora
from moe_tf.data import pairs
from moe_tf.data.wordpieces import END
from moe_tf.data.wordpieces import PAD
from moe_tf.data.wordpieces import START


def padded_length(length: int) -> int:
    """The length to which a sequence is padded, from 8, 12, 16, 24, 32, ...

    The ladder has the powers of two and what lies between them; all of it
    to 128 divides 384.
    """
    rung = 8
    while rung < length:
        rung = rung * 3 // 2 if rung & (rung - 1) == 0 else rung * 4 // 3
    return rung


def num_rows(length: int, batch_tokens: int, rows_multiple=None) -> int:
    """The number of rows of all batches of a padded length."""
    step = rows_multiple or 1
    return max(step, batch_tokens // length // step * step)


def num_batches(
    prepared: pairs.PreparedPairs,
    split: str,
    batch_tokens: int,
    *,
    pair: str | None = None,
    rows_multiple: int | None = None,
) -> int:
    """Number of batches of one pass for evaluation; see `batches`."""
    plan = _Plan(prepared, split, batch_tokens, pair, rows_multiple)
    return plan.num_batches(np.arange(len(plan.buckets)))


def batches_in_first_pass(
    prepared: pairs.PreparedPairs,
    batch_tokens: int,
    seed: int = 0,
    *,
    rows_multiple: int | None = None,
) -> int:
    """Number of batches of the first pass of training; see `batches`.

    Without weights in `data.pairs`, all passes have as many.
    """
    plan = _Plan(prepared, "train", batch_tokens, None, rows_multiple)
    return plan.num_batches(plan.drawn(seed, 0))


def batches(
    prepared: pairs.PreparedPairs,
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

    Pairs of similar length make a batch: it is padded to the
    `padded_length` of the longer side, and has `batch_tokens // length`
    rows. All batches of one length have equally many rows, so there are as
    many shapes as lengths; where pairs run out, the last rows are all
    padding, with weights of 0.

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
    plan = _Plan(prepared, split, batch_tokens, pair, rows_multiple)
    if training:
        rows = functools.partial(plan.training, seed, start_step)
    else:
        rows = plan.evaluation
    ids = tf.TensorSpec((None, None), tf.int32)
    names = ("source", "tokens", "targets")
    dataset = tf.data.Dataset.from_generator(
        lambda: map(plan.batch, rows()),
        output_signature=(
            dict.fromkeys(names, ids),
            ids,
            tf.TensorSpec((None, None), tf.float32),
        ),
    )
    return dataset.prefetch(2)


def encode_sources(
    prepared: pairs.PreparedPairs,
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
    length = padded_length(max(map(len, rows)))
    return _padded(rows, (num_rows or len(rows), length))


def encode_pairs(
    prepared: pairs.PreparedPairs,
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
    shape = (num_rows or len(pieces), padded_length(longest))
    return _batch(
        _padded(source_rows, shape),
        _padded([[START, *row] for row in pieces], shape),
        _padded([[*row, END] for row in pieces], shape),
    )


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Which sentence pairs make which batch.

    The sentence pairs of the language pairs are numbered through.
    """

    prepared: pairs.PreparedPairs
    split: str
    batch_tokens: int
    pair: str | None
    rows_multiple: int | None

    def __post_init__(self):
        corpora.check_split(self.split)
        checks.at_least("batch_tokens", self.batch_tokens, 1)
        checks.at_least(
            "rows_multiple", self.rows_multiple, 1, none_is_fine=True
        )

    @functools.cached_property
    def pairs(self):
        corpus = self.prepared.corpus
        return corpus.pairs if self.pair is None else [corpus.pair(self.pair)]

    @functools.cached_property
    def stores(self):
        by_name = self.prepared.stores[self.split]
        return [by_name[pair.name] for pair in self.pairs]

    @functools.cached_property
    def prefixes(self):
        """The ids before the sources of each language pair."""
        return [self.prepared.source_prefix(pair.target) for pair in self.pairs]

    @functools.cached_property
    def starts(self):
        """The number of each language pair's first, and of all pairs."""
        return np.cumsum([0, *map(len, self.stores)])

    @functools.cached_property
    def ladder(self):
        """The padded lengths, short to long."""
        return np.unique(self._padded_lengths)

    @functools.cached_property
    def buckets(self):
        """For each sentence pair, the place of its length in `ladder`."""
        return np.searchsorted(self.ladder, self._padded_lengths).astype("u1")

    @functools.cached_property
    def _padded_lengths(self):
        longest = [
            np.maximum(store.lengths[:, 0] + len(prefix), store.lengths[:, 1])
            for store, prefix in zip(self.stores, self.prefixes, strict=True)
        ]
        lengths = np.concatenate(longest) + 1
        rungs = [padded_length(1)]
        while rungs[-1] < lengths.max(initial=0):
            rungs.append(padded_length(rungs[-1] + 1))
        return np.array(rungs)[np.searchsorted(rungs, lengths)]

    @functools.cached_property
    def rows(self):
        """The number of rows of the batches of each length of `ladder`."""
        return np.array(
            [
                num_rows(length, self.batch_tokens, self.rows_multiple)
                for length in self.ladder.tolist()
            ]
        )

    def num_batches(self, numbers) -> int:
        """How many batches these sentence pairs make."""
        counts = np.bincount(self.buckets[numbers], minlength=len(self.ladder))
        return int((-(-counts // self.rows)).sum())

    def cut(self, numbers):
        """Batches of these sentence pairs, from short to long.

        Returns:
            A list of `(bucket, numbers)`; order is kept inside a bucket.
        """
        buckets = self.buckets[numbers]
        ordered = numbers[np.argsort(buckets, kind="stable")]
        ends = np.cumsum(np.bincount(buckets, minlength=len(self.ladder)))
        found = []
        for bucket, (end, rows) in enumerate(zip(ends, self.rows, strict=True)):
            start = ends[bucket - 1] if bucket else 0
            found += [
                (bucket, ordered[at : min(at + rows, end)])
                for at in range(start, end, rows)
            ]
        return found

    def evaluation(self) -> Iterator:
        yield from self.cut(np.arange(len(self.buckets)))

    def training(self, seed: int, start_step: int) -> Iterator:
        left_out = start_step
        for index in itertools.count():
            numbers = self.drawn(seed, index)
            count = self.num_batches(numbers)
            if left_out >= count:
                left_out -= count
                continue
            random = np.random.default_rng([seed, index])
            found = self.cut(random.permutation(numbers))
            order = random.permutation(len(found))
            yield from (found[place] for place in order[left_out:])
            left_out = 0

    def drawn(self, seed: int, index: int):
        """The sentence pairs of pass `index`, language pair by pair."""
        counts = np.diff(self.starts)
        weights = [
            count if pair.weight is None else pair.weight
            for pair, count in zip(self.pairs, counts, strict=True)
        ]
        shares = np.cumsum(weights) / np.sum(weights)
        ends = np.round(shares * counts.sum()).astype(int)
        drawn = np.diff(ends, prepend=0)
        return np.concatenate(
            [
                self._drawn_of(place, seed, index * drawn[place], drawn[place])
                for place in range(len(counts))
            ]
        )

    def _drawn_of(self, place, seed, position, count):
        """`count` of the endless stream of a language pair's permutations."""
        start, end = self.starts[place : place + 2]
        found = []
        while count:
            cycle, at = divmod(position, end - start)
            random = np.random.default_rng([seed, place, cycle])
            order = start + random.permutation(end - start)
            found.append(order[at : at + count])
            count -= len(found[-1])
            position += len(found[-1])
        return np.concatenate(found) if found else np.zeros(0, int)

    def batch(self, bucket_and_numbers):
        """The arrays of a batch."""
        bucket, numbers = bucket_and_numbers
        shape = (self.rows[bucket], self.ladder[bucket])
        source, tokens, targets = (np.full(shape, PAD, np.int32) for _ in "sto")
        places = np.searchsorted(self.starts, numbers, side="right") - 1
        for place in np.unique(places):
            store, prefix = self.stores[place], self.prefixes[place]
            rows = np.flatnonzero(places == place)
            within = numbers[rows] - self.starts[place]
            offsets = store.offsets[within]
            source_lengths, target_lengths = store.lengths[within].T
            source[rows, : len(prefix)] = prefix
            _copy(store.ids, offsets, source_lengths, source, rows, len(prefix))
            source[rows, source_lengths + len(prefix)] = END
            offsets = offsets + source_lengths
            tokens[rows, 0] = START
            _copy(store.ids, offsets, target_lengths, tokens, rows, 1)
            _copy(store.ids, offsets, target_lengths, targets, rows, 0)
            targets[rows, target_lengths] = END
        return _batch(source, tokens, targets)


def _copy(ids, offsets, lengths, to, rows, column):
    """Writes `ids[offset : offset + length]` into rows, from a column on."""
    ends = np.cumsum(lengths)
    steps = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    pieces = ids[np.repeat(offsets, lengths) + steps]
    to[np.repeat(rows, lengths), steps + column] = pieces


def _batch(source, tokens, targets):
    inputs = {"source": source, "tokens": tokens, "targets": targets}
    return inputs, targets, (targets != PAD).astype(np.float32)


def _sources(prepared, texts, language):
    prefix = prepared.source_prefix(language)
    return [[*prefix, *row, END] for row in _pieces(prepared, texts)]


def _pieces(prepared, texts):
    if not len(texts):
        raise ValueError("There must be at least one sentence. Received: none")
    return prepared.wordpieces.encode(texts).to_list()


def _padded(rows, shape):
    padded = np.full(shape, PAD, np.int32)
    for row, to in zip(rows, padded, strict=False):
        to[: len(row)] = row
    return padded
