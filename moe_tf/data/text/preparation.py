"""Counts a corpus once, and remembers the counts in the run's folder."""

import collections
import dataclasses
import json
import os

from absl import logging

from moe_tf import files
from moe_tf.data import lines
from moe_tf.data import vocabulary as vocabularies
from moe_tf.data.text import corpora

_SETTINGS = ("corpus", "max_words", "vocabulary_size")


@dataclasses.dataclass(frozen=True)
class SplitStatistics:
    """What one pass over a split found.

    Attributes:
        files: name and size of every source, in order.
        lines: sentences that can be used.
        words: their words, each sentence's end counted as one.
        unknown_words: words that map to `<UNK>`.
        skipped: for each reason, the number of lines left out.
        lengths: for each number of words, without the end, the number of
            sentences.
    """

    files: list[tuple[str, int]]
    lines: int
    words: int
    unknown_words: int
    skipped: dict[str, int]
    lengths: dict[int, int]

    @property
    def unknown_rate(self) -> float:
        """Share of words that are unknown, ends of sentences not counted."""
        return self.unknown_words / (self.words - self.lines)

    def to_json(self) -> dict:
        """A dictionary for `json.dump`, which knows only string keys."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict) -> "SplitStatistics":
        """Undoes `to_json`, also after a trip through a file."""
        return cls(
            **{
                **fields,
                "files": [tuple(file) for file in fields["files"]],
                "lengths": {
                    int(num_words): count
                    for num_words, count in fields["lengths"].items()
                },
            }
        )


@dataclasses.dataclass(frozen=True)
class PreparedText:
    """A corpus that is counted and has a vocabulary.

    Attributes:
        corpus: `corpora.Corpus`.
        vocabulary: `Vocabulary` of the train split.
        statistics: for each split, its `SplitStatistics`.
    """

    corpus: corpora.Corpus
    vocabulary: vocabularies.Vocabulary
    statistics: dict[str, SplitStatistics]


def prepare_text(data_config, workdir: str) -> PreparedText:
    """Builds or loads `vocabulary.txt` and `data.json` of a run.

    The first call in a `workdir` reads every split once. Later calls load
    what it wrote, and refuse to go on if that no longer fits. Of the sources
    they compare names and sizes, not contents, which may be terabytes.

    Args:
        data_config: see `corpora.open_corpus`; besides, `vocabulary_size`
            is the most ids, specials included.
        workdir: folder of the run, made if need be.

    Raises:
        ValueError: a setting, a source or the vocabulary has changed since
            the first call, or a source cannot be used.
        FileNotFoundError, ImportError: see `corpora.open_corpus`.
    """
    corpus = corpora.open_corpus(data_config, workdir)
    if os.path.exists(os.path.join(workdir, "data.json")):
        return _load(data_config, workdir, corpus)
    counted = {split: _count(corpus, split) for split in corpora.SPLITS}
    vocabulary = vocabularies.Vocabulary.from_counts(
        counted["train"][0], data_config.vocabulary_size
    )
    statistics = {}
    for split, (counts, found) in counted.items():
        unknown = sum(
            count for word, count in counts.items() if word not in vocabulary
        )
        statistics[split] = dataclasses.replace(found, unknown_words=unknown)
        _log(split, statistics[split])
    os.makedirs(workdir, exist_ok=True)
    vocabulary.save(os.path.join(workdir, "vocabulary.txt"))
    record = {
        "settings": {name: getattr(data_config, name) for name in _SETTINGS},
        "vocabulary": {
            "size": vocabulary.size,
            "fingerprint": vocabulary.fingerprint,
        },
        "splits": {
            split: found.to_json() for split, found in statistics.items()
        },
    }
    # Written last: a run cut short before this begins again.
    files.write(
        os.path.join(workdir, "data.json"), json.dumps(record, indent=1)
    )
    return PreparedText(corpus, vocabulary, statistics)


def _count(corpus, split):
    """Counts of words and `SplitStatistics`, `unknown_words` left at 0."""
    report = lines.LineReport()
    counts = collections.Counter()
    lengths = collections.Counter()
    for line in corpus.lines(split, report):
        words = line.split()
        counts.update(words)
        lengths[len(words)] += 1
    report.log(split)
    return counts, SplitStatistics(
        files=_files(corpus, split),
        lines=report.lines,
        words=counts.total() + report.lines,
        unknown_words=0,
        skipped=report.skipped,
        lengths=dict(sorted(lengths.items())),
    )


def _load(data_config, workdir, corpus):
    path = os.path.join(workdir, "data.json")
    with open(path, "rb") as file:
        record = json.load(file)
    remedy = f"Restore it, use another `workdir`, or delete {path}."
    for name, recorded in record["settings"].items():
        if getattr(data_config, name) != recorded:
            raise ValueError(
                f"`data.{name}`={getattr(data_config, name)!r} differs from "
                f"{recorded!r}, with which this run began. {remedy}"
            )
    statistics = {
        split: SplitStatistics.from_json(fields)
        for split, fields in record["splits"].items()
    }
    for split, found in statistics.items():
        _check_files(found.files, _files(corpus, split), split, remedy)
    words = os.path.join(workdir, "vocabulary.txt")
    vocabulary = vocabularies.Vocabulary.load(words)
    recorded = record["vocabulary"]["fingerprint"]
    if vocabulary.fingerprint != recorded:
        raise ValueError(
            f"{words} has changed since this run began: its fingerprint is "
            f"{vocabulary.fingerprint}, recorded is {recorded}. {remedy}"
        )
    return PreparedText(corpus, vocabulary, statistics)


def _check_files(recorded, present, split, remedy):
    if [name for name, _ in recorded] != [name for name, _ in present]:
        raise ValueError(
            f"The files of the {split} split are others than those with "
            f"which this run began. {remedy} Received: "
            f"{[name for name, _ in present]}, recorded: "
            f"{[name for name, _ in recorded]}"
        )
    for (name, size), (_, new_size) in zip(recorded, present, strict=True):
        if size != new_size:
            raise ValueError(
                f"{name} of the {split} split has changed since this run "
                f"began: {new_size} bytes, recorded {size}. {remedy}"
            )


def _files(corpus, split):
    return [(source.name, source.size) for source in corpus.sources[split]]


def _log(split, found):
    logging.info(
        "%s: %d sources, %d sentences, %d words with ends, %.2f%% unknown, "
        "skipped %s",
        split,
        len(found.files),
        found.lines,
        found.words,
        100 * found.unknown_rate,
        found.skipped,
    )
