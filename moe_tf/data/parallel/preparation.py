"""Encodes a parallel corpus once, and keeps it in the run's folder."""

import dataclasses
import itertools
import os

import ml_collections
import numpy as np
from absl import logging

from moe_tf import checks
from moe_tf import special_ids
from moe_tf.data import lines
from moe_tf.data import record as records
from moe_tf.data.parallel import corpora
from moe_tf.data.parallel import store as pair_store
from moe_tf.data.parallel import wordpieces as wordpieces_lib

# Pairs that are encoded at once.
_CHUNK = 4096

TOO_MANY_PIECES = "too_many_pieces"

_SETTINGS = ("corpus", "vocabulary_size", "max_pieces")


@dataclasses.dataclass(frozen=True)
class PairStatistics:
    """Counts of one split of a language pair.

    Attributes:
        sources: name and size of every source, in order.
        pairs: sentence pairs that can be used.
        source_pieces: pieces of all sources, each sentence's end counted.
        target_pieces: pieces of all targets, each sentence's end counted.
        unknown_pieces: pieces of both sides that are `<UNK>`.
        longest: pieces of the longest side, its end counted.
        skipped: number of skipped pairs by reason.
    """

    sources: list[tuple[str, int]]
    pairs: int
    source_pieces: int
    target_pieces: int
    unknown_pieces: int
    longest: int
    skipped: dict[str, int]

    def to_json(self) -> dict:
        """Returns a dictionary for `json.dump`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict) -> "PairStatistics":
        """Makes statistics of what `to_json` returned, or JSON made of it."""
        sources = [tuple(source) for source in fields["sources"]]
        return cls(**{**fields, "sources": sources})


@dataclasses.dataclass(frozen=True)
class PreparedPairs:
    """An encoded parallel corpus.

    Attributes:
        corpus: `corpora.ParallelCorpus`.
        wordpieces: the tokenizer, learned on the train split of all pairs.
        statistics: `PairStatistics` by split and name of a pair.
        stores: `PairStore` by split and name of a pair.
    """

    corpus: corpora.ParallelCorpus
    wordpieces: wordpieces_lib.Wordpieces
    statistics: dict[str, dict[str, PairStatistics]]
    stores: dict[str, dict[str, pair_store.PairStore]]

    def source_prefix(self, language: str | None = None) -> tuple[int, ...]:
        """Returns the ids that precede a source to be translated.

        Without several target languages there are none, and `language` is
        optional. With several the prefix is the symbol of `language`.

        Raises:
            ValueError: the language is not known, or must be given.
        """
        targets = {pair.target for pair in self.corpus.pairs}
        if (
            language is None
            and len(targets) > 1
            or (language is not None and language not in targets)
        ):
            raise ValueError(
                f"`language` must be one of {sorted(targets)}. "
                f"Received: {language!r}"
            )
        if len(targets) == 1:
            return ()
        return (self.wordpieces.language_id(language),)


def prepare_pairs(
    data_config: ml_collections.ConfigDict, workdir: str
) -> PreparedPairs:
    """Builds or loads `wordpieces.model`, `pairs/` and `data.json` of a run.

    The first call in a `workdir` learns wordpieces from both sides of all
    train pairs and encodes every split. A text that several pairs share is
    read once, and of more than `wordpieces.MAX_LINES` lines a sample is taken.
    Later calls load the files of the first call, and raise if settings or
    sources differ. Names and sizes of the sources are compared, not their
    contents.

    A train pair is skipped and counted if one side has more than `max_pieces`
    pieces, the end and the symbol of the target language included. The other
    splits keep such pairs.

    Args:
        data_config: the fields of `corpora.open_parallel`, `max_pieces`, and
            `vocabulary_size`, the number of wordpieces, symbols included.
        workdir: folder of the run, made if need be.

    Raises:
        ValueError: a setting, a source or a file in `workdir` has changed
            since the first call, or a source or setting cannot be used.
        FileNotFoundError, ImportError: see `corpora.open_parallel`.
        OSError: `workdir` cannot be written.
    """
    checks.at_least("data.max_pieces", data_config.max_pieces, 2)
    corpus = corpora.open_parallel(data_config, workdir)
    if records.is_recorded(workdir):
        return _load(data_config, workdir, corpus)
    for split in ("validation", "test"):  # to report mistakes early
        for pair in corpus.pairs:
            for _ in corpus.lines(pair, split):
                pass
    targets = list(dict.fromkeys(pair.target for pair in corpus.pairs))
    wordpieces = wordpieces_lib.Wordpieces.learn(
        corpus.texts("train"),
        data_config.vocabulary_size,
        targets if len(targets) > 1 else (),
    )
    os.makedirs(os.path.join(workdir, "pairs"), exist_ok=True)
    wordpieces.save(_wordpieces_path(workdir))
    statistics = {split: {} for split in corpora.SPLITS}
    stores = {split: {} for split in corpora.SPLITS}
    for split, pair in itertools.product(corpora.SPLITS, corpus.pairs):
        encoder = _Encoder(
            corpus, pair, split, wordpieces, data_config.max_pieces
        )
        stores[split][pair.name] = pair_store.PairStore.write(
            _store_path(workdir, pair, split), wordpieces.size, encoder.chunks()
        )
        statistics[split][pair.name] = encoder.statistics()
    _write_record(data_config, workdir, wordpieces, statistics, stores)
    return PreparedPairs(corpus, wordpieces, statistics, stores)


class _Encoder:
    """Encodes one split of a language pair, and counts its pieces."""

    def __init__(self, corpus, pair, split, wordpieces, max_pieces):
        self.corpus = corpus
        self.pair = pair
        self.split = split
        self.wordpieces = wordpieces
        self.max_pieces = max_pieces
        self.report = lines.LineReport()
        self.report.skipped[TOO_MANY_PIECES] = 0
        self.lengths = np.zeros(2, np.int64)
        self.longest = self.unknown = 0

    def chunks(self):
        """Yields ids and lengths for `PairStore.write`."""
        rows = self.corpus.lines(self.pair, self.split, self.report)
        while chunk := list(itertools.islice(rows, _CHUNK)):
            # Sources and targets alternate, as in the store.
            ids, lengths = self.wordpieces.encode_lines(
                list(itertools.chain.from_iterable(chunk))
            )
            lengths = lengths.reshape(-1, 2)
            if self.split == "train":
                ids, lengths = self._without_long(ids, lengths)
            self.lengths += lengths.sum(axis=0)
            self.longest = max(self.longest, int(lengths.max(initial=0)))
            self.unknown += int((ids == special_ids.UNK).sum())
            logging.log_every_n_seconds(
                logging.INFO,
                "%s %s: %d sentence pairs so far",
                30,
                self.pair.name,
                self.split,
                self.report.lines,
            )
            yield ids, lengths

    def _without_long(self, ids, lengths):
        # Room for the ends of both sides, and the symbol before the source.
        has_symbol = bool(self.wordpieces.languages)
        max_lengths = self.max_pieces - 1 - np.array([has_symbol, False])
        kept = (lengths <= max_lengths).all(axis=1)
        first = self.report.lines - len(kept) + 1
        for number in first + np.flatnonzero(~kept):
            self.report.skip(TOO_MANY_PIECES, f"usable pair {number}")
        return ids[np.repeat(kept, lengths.sum(axis=1))], lengths[kept]

    def statistics(self) -> PairStatistics:
        """Returns and logs the counts; call it after `chunks` has ended."""
        skipped = self.report.skipped
        # `chunks` counted these as lines that can be used.
        self.report.lines -= skipped[TOO_MANY_PIECES]
        self.report.log(f"{self.pair.name} {self.split}")
        num_pairs = self.report.lines
        if not num_pairs:
            raise ValueError(
                f"`data.max_pieces`={self.max_pieces} leaves no pair of "
                f"{self.pair.name} to train on. Raise it. Skipped: {skipped}"
            )
        source_pieces, target_pieces = map(int, self.lengths + num_pairs)
        counted = PairStatistics(
            sources=self.corpus.sizes(self.pair, self.split),
            pairs=num_pairs,
            source_pieces=source_pieces,
            target_pieces=target_pieces,
            unknown_pieces=self.unknown,
            longest=self.longest + 1,
            skipped=skipped,
        )
        logging.info(
            "%s %s: %d sentence pairs, %d source and %d target pieces with "
            "ends, at most %d a side, %.2f%% unknown, skipped %s",
            self.pair.name,
            self.split,
            counted.pairs,
            counted.source_pieces,
            counted.target_pieces,
            counted.longest,
            100 * counted.unknown_pieces / max(int(self.lengths.sum()), 1),
            counted.skipped,
        )
        return counted


def _write_record(data_config, workdir, wordpieces, statistics, stores):
    fields = {
        "settings": {name: getattr(data_config, name) for name in _SETTINGS},
        "wordpieces": {
            "size": wordpieces.size,
            "fingerprint": wordpieces.fingerprint,
        },
        "stores": {
            split: {name: store.sizes for name, store in by_pair.items()}
            for split, by_pair in stores.items()
        },
        "splits": {
            split: {name: pair.to_json() for name, pair in by_pair.items()}
            for split, by_pair in statistics.items()
        },
    }
    records.write_record(workdir, fields)


def _load(data_config, workdir, corpus):
    recorded = records.Record(workdir)
    if "wordpieces" not in recorded.fields:
        raise ValueError(
            f"{recorded.path} is not of a run with sentence pairs. "
            f"{recorded.remedy}"
        )
    recorded.check_settings(data_config)
    splits = recorded.fields["splits"]
    names = [pair.name for pair in corpus.pairs]
    if names != list(splits["train"]):
        raise ValueError(
            f"`data.pairs` lists {names}, but this run began with "
            f"{list(splits['train'])}, in this order. {recorded.remedy}"
        )
    wordpieces = wordpieces_lib.Wordpieces.load(_wordpieces_path(workdir))
    recorded.check_fingerprint(
        _wordpieces_path(workdir),
        recorded.fields["wordpieces"]["fingerprint"],
        wordpieces.fingerprint,
    )
    statistics = {split: {} for split in corpora.SPLITS}
    stores = {split: {} for split in corpora.SPLITS}
    for split, pair in itertools.product(corpora.SPLITS, corpus.pairs):
        counted = PairStatistics.from_json(splits[split][pair.name])
        store = pair_store.PairStore(
            _store_path(workdir, pair, split), wordpieces.size
        )
        recorded.check_sizes(
            counted.sources,
            corpus.sizes(pair, split),
            f"of the {split} split of {pair.name}",
        )
        recorded.check_sizes(
            recorded.fields["stores"][split][pair.name].items(),
            store.sizes.items(),
            f"in {os.path.dirname(store.path)}",
        )
        statistics[split][pair.name] = counted
        stores[split][pair.name] = store
    return PreparedPairs(corpus, wordpieces, statistics, stores)


def _wordpieces_path(workdir):
    return os.path.join(workdir, "wordpieces.model")


def _store_path(workdir, pair, split):
    return os.path.join(workdir, "pairs", f"{pair.name}.{split}")
