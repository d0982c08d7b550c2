"""Counts a text corpus once, and keeps the counts in the run's folder."""

import collections
import dataclasses
import os

import ml_collections
from absl import logging

from moe_tf.data import lines
from moe_tf.data import record as records
from moe_tf.data import vocabulary as vocabularies
from moe_tf.data.text import corpora

_SETTINGS = ("corpus", "max_words", "vocabulary_size")


@dataclasses.dataclass(frozen=True)
class SplitStatistics:
    """Counts of a split.

    Attributes:
        files: name and size of every source, in order.
        lines: sentences that can be used.
        words: words of the usable sentences, each sentence's end counted as
            one.
        unknown_words: words that map to `<UNK>`.
        skipped: number of skipped lines by reason.
        lengths: number of sentences by number of words, without the end.
    """

    files: list[tuple[str, int]]
    lines: int
    words: int
    unknown_words: int
    skipped: dict[str, int]
    lengths: dict[int, int]

    @property
    def unknown_rate(self) -> float:
        """Fraction of words that are unknown; sentence ends do not count."""
        return self.unknown_words / (self.words - self.lines)

    def to_json(self) -> dict:
        """Returns a dictionary for `json.dump`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict) -> "SplitStatistics":
        """Makes statistics of what `to_json` returned, or JSON made of it."""
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
    """A text corpus with its counts and its vocabulary.

    Attributes:
        corpus: `corpora.Corpus`.
        vocabulary: `Vocabulary` of the train split.
        statistics: for each split, its `SplitStatistics`.
    """

    corpus: corpora.Corpus
    vocabulary: vocabularies.Vocabulary
    statistics: dict[str, SplitStatistics]


def prepare_text(
    data_config: ml_collections.ConfigDict, workdir: str
) -> PreparedText:
    """Builds or loads `vocabulary.txt` and `data.json` of a run.

    The first call in a `workdir` reads every split once. Later calls load
    the files of the first call, and raise if settings or sources differ.
    Names and sizes of the sources are compared, not their contents, which may
    be terabytes.

    Args:
        data_config: the fields of `corpora.open_corpus`, and
            `vocabulary_size`, the maximal number of ids, specials included.
        workdir: folder of the run, made if need be.

    Raises:
        ValueError: a setting, a source or the vocabulary has changed since
            the first call, or a source cannot be used.
        FileNotFoundError, ImportError: see `corpora.open_corpus`.
    """
    corpus = corpora.open_corpus(data_config, workdir)
    if records.is_recorded(workdir):
        return _load(data_config, workdir, corpus)
    counted = {split: _count(corpus, split) for split in corpora.SPLITS}
    vocabulary = vocabularies.Vocabulary.from_counts(
        counted["train"][0], data_config.vocabulary_size
    )
    statistics = {}
    for split, (counts, split_statistics) in counted.items():
        unknown = sum(
            count for word, count in counts.items() if word not in vocabulary
        )
        statistics[split] = dataclasses.replace(
            split_statistics, unknown_words=unknown
        )
        _log(split, statistics[split])
    os.makedirs(workdir, exist_ok=True)
    vocabulary.save(os.path.join(workdir, "vocabulary.txt"))
    fields = {
        "settings": {name: getattr(data_config, name) for name in _SETTINGS},
        "vocabulary": {
            "size": vocabulary.size,
            "fingerprint": vocabulary.fingerprint,
        },
        "splits": {
            split: counted.to_json() for split, counted in statistics.items()
        },
    }
    records.write_record(workdir, fields)
    return PreparedText(corpus, vocabulary, statistics)


def _count(corpus, split):
    """Returns counts of words, and statistics with `unknown_words` of 0."""
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
    recorded = records.Record(workdir)
    recorded.check_settings(data_config)
    statistics = {
        split: SplitStatistics.from_json(fields)
        for split, fields in recorded.fields["splits"].items()
    }
    for split, counted in statistics.items():
        recorded.check_sizes(
            counted.files, _files(corpus, split), f"of the {split} split"
        )
    path = os.path.join(workdir, "vocabulary.txt")
    vocabulary = vocabularies.Vocabulary.load(path)
    recorded.check_fingerprint(
        path,
        recorded.fields["vocabulary"]["fingerprint"],
        vocabulary.fingerprint,
    )
    return PreparedText(corpus, vocabulary, statistics)


def _files(corpus, split):
    return [(source.name, source.size) for source in corpus.sources[split]]


def _log(split, statistics):
    logging.info(
        "%s: %d sources, %d sentences, %d words with ends, %.2f%% unknown, "
        "skipped %s",
        split,
        len(statistics.files),
        statistics.lines,
        statistics.words,
        100 * statistics.unknown_rate,
        statistics.skipped,
    )
