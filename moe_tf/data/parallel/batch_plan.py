"""Which sentence pairs make which batch: arrays of numbers, no text."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import numpy as np

from moe_tf import checks
from moe_tf.data.parallel import preparation
from moe_tf.data.text import corpora

# So that no two generators begin with the same numbers.
_SHUFFLE, _PERMUTATION = 1, 2


def padded_length(length: int) -> int:
    """The length to which a sequence is padded, from 8, 12, 16, 24, 32, ...

    The ladder has the powers of two and what lies between them; all of it
    to 128 divides 384.
    """
    rung = 8
    while rung < length:
        rung = rung * 3 // 2 if rung & (rung - 1) == 0 else rung * 4 // 3
    return rung


def rows_per_batch(length: int, batch_tokens: int, rows_multiple=None) -> int:
    """The number of rows of all batches of a padded length."""
    step = rows_multiple or 1
    return max(step, batch_tokens // length // step * step)


@dataclasses.dataclass(frozen=True)
class PlannedBatch:
    """What is in a batch.

    Attributes:
        length: int, positions of each row.
        num_rows: int, rows, of which the first are not empty.
        numbers: int `(N,)`, the sentence pair of each row that is not.
    """

    length: int
    num_rows: int
    numbers: np.ndarray


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """Which sentence pairs make which batch.

    The sentence pairs of the language pairs are numbered through.
    """

    prepared: preparation.PreparedPairs
    split: str
    batch_tokens: int
    pair: str | None
    rows_multiple: int | None

    def __post_init__(self):
        corpora.check_split(self.split)
        if self.pair is not None:
            self.prepared.corpus.pair(self.pair)
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
                rows_per_batch(length, self.batch_tokens, self.rows_multiple)
                for length in self.ladder.tolist()
            ]
        )

    @property
    def all(self):
        """Every sentence pair, in order."""
        return np.arange(self.starts[-1])

    def num_batches(self, numbers) -> int:
        """How many batches these sentence pairs make."""
        counts = np.bincount(self.buckets[numbers], minlength=len(self.ladder))
        return int((-(-counts // self.rows)).sum())

    def evaluation(self) -> Iterator[PlannedBatch]:
        """The batches of one pass, from short to long."""
        yield from self._cut(self.all)

    def training(self, seed: int, start_step: int) -> Iterator[PlannedBatch]:
        """The endless stream of batches from `start_step` on."""
        left_out = start_step
        for index in itertools.count():
            numbers = self.pairs_of_pass(seed, index)
            count = self.num_batches(numbers)
            if left_out >= count:
                left_out -= count
                continue
            random = np.random.default_rng([seed, _SHUFFLE, index])
            found = self._cut(random.permutation(numbers))
            order = random.permutation(len(found))
            yield from (found[place] for place in order[left_out:])
            left_out = 0

    def pairs_of_pass(self, seed: int, index: int) -> np.ndarray:
        """The sentence pairs of pass `index`, language pair by pair."""
        return np.concatenate(
            [
                self._drawn_of(
                    place,
                    seed,
                    self._position(place, index),
                    self._position(place, index + 1),
                )
                for place in range(len(self.pairs))
            ]
        )

    def by_language_pair(self, numbers):
        """Where sentence pairs are.

        Yields:
            For each language pair among them its place, the places of its
            sentences in `numbers`, and their numbers in its store.
        """
        places = np.searchsorted(self.starts, numbers, side="right") - 1
        for place in np.unique(places):
            rows = np.flatnonzero(places == place)
            yield place, rows, numbers[rows] - self.starts[place]

    def _position(self, place, index):
        """How many of a language pair are drawn before pass `index`."""
        weight = self.pairs[place].weight
        if weight is None:
            return index * len(self.stores[place])
        share = weight / sum(pair.weight for pair in self.pairs)
        return round(index * int(self.starts[-1]) * share)

    def _drawn_of(self, place, seed, position, end):
        """A part of the endless stream of a language pair's permutations."""
        size = len(self.stores[place])
        found = [np.zeros(0, int)]
        while position < end:
            cycle, at = divmod(position, size)
            random = np.random.default_rng([seed, _PERMUTATION, place, cycle])
            order = self.starts[place] + random.permutation(size)
            found.append(order[at : at + end - position])
            position += len(found[-1])
        return np.concatenate(found)

    def _cut(self, numbers):
        """Batches from short to long; order is kept inside a length."""
        buckets = self.buckets[numbers]
        ordered = numbers[np.argsort(buckets, kind="stable")]
        ends = np.cumsum(np.bincount(buckets, minlength=len(self.ladder)))
        return [
            PlannedBatch(length, rows, ordered[at : min(at + rows, end)])
            for length, rows, start, end in zip(
                self.ladder.tolist(),
                self.rows.tolist(),
                [0, *ends[:-1]],
                ends,
                strict=True,
            )
            for at in range(start, end, rows)
        ]
