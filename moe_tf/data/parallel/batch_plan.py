"""The plan of batches: the indices of the sentence pairs in each batch."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import numpy as np

from moe_tf import checks
from moe_tf.data.parallel import corpora
from moe_tf.data.parallel import preparation
from moe_tf.data.parallel import store as pair_store
from moe_tf.data.text import corpora as text_corpora

# Parts of seeds, so that no two generators draw the same numbers.
_SHUFFLE, _PERMUTATION = 1, 2


def padded_length(length: int) -> int:
    """Returns the padded length of a sequence: 8, 12, 16, 24, 32, 48, ...

    The lengths are powers of two and their multiples by 1.5. All lengths up to
    128 divide 384.
    """
    rung = 8
    while rung < length:
        rung = rung * 3 // 2 if rung & (rung - 1) == 0 else rung * 4 // 3
    return rung


def rows_per_batch(
    length: int, batch_tokens: int, rows_multiple: int | None = None
) -> int:
    """Returns the number of rows of each batch of a padded length."""
    step = rows_multiple or 1
    return max(step, batch_tokens // length // step * step)


@dataclasses.dataclass(frozen=True)
class PlannedBatch:
    """The contents of a batch.

    Attributes:
        length: int, positions of each row.
        num_rows: int, rows; rows after the sentence pairs are all padding.
        indices: int `(N,)`, the sentence pairs of the first `N` rows.
    """

    length: int
    num_rows: int
    indices: np.ndarray


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """The plan of the batches of a split.

    Sentence pairs are known by an index, which runs through all language pairs
    one after the other.

    Args:
        prepared: `PreparedPairs`.
        split: `"train"`, `"validation"` or `"test"`.
        batch_tokens: int, maximal positions of one side in a batch.
        pair: name of the one language pair to read; `None` for all.
        rows_multiple: optional int that divides the rows of each batch.

    Raises:
        ValueError: an argument cannot be used.
    """

    prepared: preparation.PreparedPairs
    split: str
    batch_tokens: int
    pair: str | None
    rows_multiple: int | None

    def __post_init__(self) -> None:
        text_corpora.check_split(self.split)
        if self.pair is not None:
            self.prepared.corpus.pair(self.pair)
        checks.at_least("batch_tokens", self.batch_tokens, 1)
        checks.at_least("rows_multiple", self.rows_multiple, 1, allow_none=True)

    @functools.cached_property
    def pairs(self) -> list[corpora.Pair]:
        """Language pairs in the plan."""
        corpus = self.prepared.corpus
        return corpus.pairs if self.pair is None else [corpus.pair(self.pair)]

    @functools.cached_property
    def stores(self) -> list[pair_store.PairStore]:
        """Store of each language pair."""
        by_name = self.prepared.stores[self.split]
        return [by_name[pair.name] for pair in self.pairs]

    @functools.cached_property
    def prefixes(self) -> list[tuple[int, ...]]:
        """Ids before the sources of each language pair."""
        return [self.prepared.source_prefix(pair.target) for pair in self.pairs]

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """Index of each language pair's first sentence pair, and the total."""
        return np.cumsum([0, *map(len, self.stores)])

    @functools.cached_property
    def ladder(self) -> np.ndarray:
        """Padded lengths, from short to long."""
        return np.unique(self._padded_lengths)

    @functools.cached_property
    def buckets(self) -> np.ndarray:
        """For each sentence pair, the index of its length in `ladder`."""
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
    def rows(self) -> np.ndarray:
        """Number of rows per batch for each length of `ladder`."""
        return np.array(
            [
                rows_per_batch(length, self.batch_tokens, self.rows_multiple)
                for length in self.ladder.tolist()
            ]
        )

    @property
    def all_indices(self) -> np.ndarray:
        """Indices of all sentence pairs, in order."""
        return np.arange(self.starts[-1])

    def num_batches(self, indices: np.ndarray) -> int:
        """Returns the number of batches of these sentence pairs."""
        counts = np.bincount(self.buckets[indices], minlength=len(self.ladder))
        return int((-(-counts // self.rows)).sum())

    def evaluation_batches(self) -> Iterator[PlannedBatch]:
        """Yields the batches of one pass, from short to long."""
        yield from self._split_into_batches(self.all_indices)

    def training_batches(
        self, seed: int, start_step: int
    ) -> Iterator[PlannedBatch]:
        """Yields the endless stream of batches from `start_step` on."""
        num_skipped = start_step
        for pass_index in itertools.count():
            indices = self.pairs_of_pass(seed, pass_index)
            count = self.num_batches(indices)
            if num_skipped >= count:
                num_skipped -= count
                continue
            random = np.random.default_rng([seed, _SHUFFLE, pass_index])
            batches = self._split_into_batches(random.permutation(indices))
            order = random.permutation(len(batches))
            yield from (batches[place] for place in order[num_skipped:])
            num_skipped = 0

    def pairs_of_pass(self, seed: int, pass_index: int) -> np.ndarray:
        """Returns the sentence pairs of a pass, one language pair at a time."""
        return np.concatenate(
            [
                self._drawn_of(
                    place,
                    seed,
                    self._position(place, pass_index),
                    self._position(place, pass_index + 1),
                )
                for place in range(len(self.pairs))
            ]
        )

    def by_language_pair(
        self, indices: np.ndarray
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Groups sentence pairs by language pair.

        Yields:
            The position of a language pair in `pairs`, the positions of its
            sentence pairs in `indices`, and their indices in its store.
        """
        places = np.searchsorted(self.starts, indices, side="right") - 1
        for place in np.unique(places):
            rows = np.flatnonzero(places == place)
            yield place, rows, indices[rows] - self.starts[place]

    def _position(self, place, pass_index):
        """Returns the number of a language pair's draws before a pass."""
        weight = self.pairs[place].weight
        if weight is None:
            return pass_index * len(self.stores[place])
        fraction = weight / sum(pair.weight for pair in self.pairs)
        return round(pass_index * int(self.starts[-1]) * fraction)

    def _drawn_of(self, place, seed, position, end):
        """Returns a part of the endless stream of a language pair's draws.

        The stream is one random permutation of the pairs after the other.
        """
        size = len(self.stores[place])
        parts = [np.zeros(0, int)]
        while position < end:
            cycle, at = divmod(position, size)
            random = np.random.default_rng([seed, _PERMUTATION, place, cycle])
            order = self.starts[place] + random.permutation(size)
            parts.append(order[at : at + end - position])
            position += len(parts[-1])
        return np.concatenate(parts)

    def _split_into_batches(self, indices):
        """Makes batches from short to long, in order within a length."""
        buckets = self.buckets[indices]
        ordered = indices[np.argsort(buckets, kind="stable")]
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
