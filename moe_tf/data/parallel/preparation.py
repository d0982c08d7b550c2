"""Encodes a parallel corpus once, and remembers it in the run's folder."""

import dataclasses
import itertools
import json
import os

import numpy as np
from absl import logging

from moe_tf import checks
from moe_tf import files
from moe_tf import special_ids
from moe_tf.data import lines
from moe_tf.data.parallel import corpora
from moe_tf.data.parallel import store as pair_store
from moe_tf.data.parallel import wordpieces as wordpieces_lib

# Pairs that are encoded at once.
_CHUNK = 4096

TOO_MANY_PIECES = "too_many_pieces"

_SETTINGS = ("corpus", "vocabulary_size", "max_pieces")


@dataclasses.dataclass(frozen=True)
class PairStatistics:
    """What one pass over a language pair's split found.

    Attributes:
        sources: name and size of every source, in order.
        pairs: sentence pairs that can be used.
        source_pieces: their source pieces, each sentence's end counted.
        target_pieces: their target pieces, each sentence's end counted.
        unknown_pieces: pieces of both sides that are `<UNK>`.
        longest: most pieces of a side, its end counted.
        skipped: for each reason, the number of pairs left out.
    """

    sources: list[tuple[str, int]]
    pairs: int
    source_pieces: int
    target_pieces: int
    unknown_pieces: int
    longest: int
    skipped: dict[str, int]

    def to_json(self) -> dict:
        """A dictionary for `json.dump`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict) -> "PairStatistics":
        """Undoes `to_json`, also after a trip through a file."""
        sources = [tuple(source) for source in fields["sources"]]
        return cls(**{**fields, "sources": sources})


@dataclasses.dataclass(frozen=True)
class PreparedPairs:
    """A parallel corpus that is encoded.

    Attributes:
        corpus: `parallel.ParallelCorpus`.
        wordpieces: `Wordpieces`, learned on the train split of all pairs.
        statistics: by split and name of a pair, its `PairStatistics`.
        stores: by split and name of a pair, its `pair_store.PairStore`.
    """

    corpus: corpora.ParallelCorpus
    wordpieces: wordpieces_lib.Wordpieces
    statistics: dict[str, dict[str, PairStatistics]]
    stores: dict[str, dict[str, pair_store.PairStore]]

    def source_prefix(self, language: str | None = None) -> tuple[int, ...]:
        """Ids before a source that is to be translated to `language`.

        Where all pairs have the same target language there are none, and
        `language` may be left out.

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


def prepare_pairs(data_config, workdir: str) -> PreparedPairs:
    """Builds or loads `wordpieces.model`, `pairs/` and `data.json` of a run.

    The first call in a `workdir` learns wordpieces from both sides of all
    train pairs (a text that several pairs share is read once, and of more
    than `wordpieces.MOST_LINES` lines a sample is taken) and encodes every
    split. Later calls load what it wrote, and refuse to go on if that no
    longer fits. Of the sources they compare names and sizes, not contents.

    Train pairs of which a side has more than `max_pieces` pieces, its end
    and the symbol of the target language counted, are left out and counted.
    The other splits keep them.

    Args:
        data_config: see `parallel.open_parallel`; besides, `vocabulary_size`
            is the number of wordpieces, symbols included, and `max_pieces`
            as above.
        workdir: folder of the run, made if need be.

    Raises:
        ValueError: a setting, a source or a file in `workdir` has changed
            since the first call, or a source or setting cannot be used.
        FileNotFoundError, ImportError: see `parallel.open_parallel`.
        OSError: `workdir` cannot be written.
    """
    checks.at_least("data.max_pieces", data_config.max_pieces, 2)
    corpus = corpora.open_parallel(data_config, workdir)
    if os.path.exists(os.path.join(workdir, "data.json")):
        return _load(data_config, workdir, corpus)
    for split in ("validation", "test"):  # mistakes first, not last
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
    """Encodes one split of a language pair, and counts as it goes."""

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
            # Source after target after source, as the file has them.
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
        # The ends of both sides, and the symbol before the source.
        has_symbol = bool(self.wordpieces.languages)
        most = self.max_pieces - 1 - np.array([has_symbol, False])
        kept = (lengths <= most).all(axis=1)
        first = self.report.lines - len(kept) + 1
        for number in first + np.flatnonzero(~kept):
            self.report.skip(TOO_MANY_PIECES, f"usable pair {number}")
        return ids[np.repeat(kept, lengths.sum(axis=1))], lengths[kept]

    def statistics(self) -> PairStatistics:
        """What was found, once `chunks` has ended."""
        skipped = self.report.skipped
        # Until all were read these counted as lines that can be used.
        self.report.lines -= skipped[TOO_MANY_PIECES]
        self.report.log(f"{self.pair.name} {self.split}")
        num_pairs = self.report.lines
        if not num_pairs:
            raise ValueError(
                f"`data.max_pieces`={self.max_pieces} leaves no pair of "
                f"{self.pair.name} to train on. Raise it. Skipped: {skipped}"
            )
        source_pieces, target_pieces = map(int, self.lengths + num_pairs)
        found = PairStatistics(
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
            found.pairs,
            found.source_pieces,
            found.target_pieces,
            found.longest,
            100 * found.unknown_pieces / max(int(self.lengths.sum()), 1),
            found.skipped,
        )
        return found


def _write_record(data_config, workdir, wordpieces, statistics, stores):
    record = {
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
            split: {name: found.to_json() for name, found in by_pair.items()}
            for split, by_pair in statistics.items()
        },
    }
    # Written last: a run cut short before this begins again.
    files.write(
        os.path.join(workdir, "data.json"), json.dumps(record, indent=1)
    )


def _load(data_config, workdir, corpus):
    path = os.path.join(workdir, "data.json")
    with open(path, "rb") as file:
        record = json.load(file)
    remedy = f"Restore it, use another `workdir`, or delete {path}."
    if "wordpieces" not in record:
        raise ValueError(
            f"{path} is not of a run with sentence pairs. {remedy}"
        )
    for name, recorded in record["settings"].items():
        if getattr(data_config, name) != recorded:
            raise ValueError(
                f"`data.{name}`={getattr(data_config, name)!r} differs from "
                f"{recorded!r}, with which this run began. {remedy}"
            )
    names = [pair.name for pair in corpus.pairs]
    if names != (recorded := list(record["splits"]["train"])):
        raise ValueError(
            f"`data.pairs` lists {names}, but this run began with {recorded}, "
            f"in this order. {remedy}"
        )
    wordpieces = wordpieces_lib.Wordpieces.load(_wordpieces_path(workdir))
    recorded = record["wordpieces"]["fingerprint"]
    if wordpieces.fingerprint != recorded:
        raise ValueError(
            f"{_wordpieces_path(workdir)} has changed since this run began: "
            f"its fingerprint is {wordpieces.fingerprint}, recorded is "
            f"{recorded}. {remedy}"
        )
    statistics = {split: {} for split in corpora.SPLITS}
    stores = {split: {} for split in corpora.SPLITS}
    for split, pair in itertools.product(corpora.SPLITS, corpus.pairs):
        found = PairStatistics.from_json(record["splits"][split][pair.name])
        store = pair_store.PairStore(
            _store_path(workdir, pair, split), wordpieces.size
        )
        what = f"of the {split} split of {pair.name}"
        _check_sizes(found.sources, corpus.sizes(pair, split), what, remedy)
        _check_sizes(
            record["stores"][split][pair.name].items(),
            store.sizes.items(),
            f"in {os.path.dirname(store.path)}",
            remedy,
        )
        statistics[split][pair.name] = found
        stores[split][pair.name] = store
    return PreparedPairs(corpus, wordpieces, statistics, stores)


def _check_sizes(recorded, present, what, remedy):
    recorded, present = list(recorded), list(present)
    if [name for name, _ in recorded] != [name for name, _ in present]:
        raise ValueError(
            f"The files {what} are others than those with which this run "
            f"began. {remedy} Received: {[name for name, _ in present]}, "
            f"recorded: {[name for name, _ in recorded]}"
        )
    for (name, size), (_, new_size) in zip(recorded, present, strict=True):
        if size != new_size:
            raise ValueError(
                f"{name} {what} has changed since this run began: {new_size} "
                f"bytes, recorded {size}. {remedy}"
            )


def _wordpieces_path(workdir):
    return os.path.join(workdir, "wordpieces.model")


def _store_path(workdir, pair, split):
    return os.path.join(workdir, "pairs", f"{pair.name}.{split}")
