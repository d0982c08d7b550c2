"""Opens the text corpora that `config.data` names."""

import dataclasses
import functools
import os
from collections.abc import Iterator
from collections.abc import Sequence

import ml_collections
from absl import logging

from moe_tf import checks
from moe_tf.data import lines
from moe_tf.data.text import sotu

SPLITS = sotu.SPLITS

_LM1B_TRAIN = "training-monolingual.tokenized.shuffled/news.en-{:05d}-of-00100"
_LM1B_HELD_OUT = (
    "heldout-monolingual.tokenized.shuffled/news.en.heldout-{:05d}-of-00050"
)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Sentences in three splits.

    Attributes:
        sources: list of `lines.Source`s by split.
        max_words: maximal number of words of a sentence; longer sentences are
            skipped.
    """

    sources: dict[str, list[lines.Source]]
    max_words: int

    def lines(
        self,
        split: str,
        report: lines.LineReport | None = None,
        order: Sequence[int] | None = None,
    ) -> Iterator[bytes]:
        """Yields the usable sentences of a split; see `lines.usable_lines`.

        Args:
            split: `"train"`, `"validation"` or `"test"`.
            report: optional `LineReport` to count in.
            order: optional permutation of the split's sources.
        """
        check_split(split)
        sources = self.sources[split]
        if order is not None:
            sources = [sources[index] for index in order]
        return lines.usable_lines(sources, self.max_words, report)


def open_corpus(data_config: ml_collections.ConfigDict, workdir: str) -> Corpus:
    """Opens the corpus `data_config.corpus`.

    | `corpus` | text |
    | --- | --- |
    | `"sotu"` | State of the Union addresses, see `moe_tf.data.text.sotu`; split into sentences under `workdir` |
    | `"files"` | the files that `train`, `validation` and `test` name |
    | `"lm1b"` | the 1-Billion-Word benchmark in the folder `path`; test is held-out shard 0, as in the literature, validation shard 1 |
    | `"tfds:lm1b"` | the same text by tensorflow_datasets, kept in `path` if given; validation and test are the halves of its test split |

    Args:
        data_config: has `corpus`, `max_words` and the fields in the table.
        workdir: folder of the run.

    Raises:
        FileNotFoundError: a file is missing.
        ImportError: the package of the corpus is not installed.
        ValueError: a setting cannot be used.
    """  # noqa: E501
    checks.at_least("data.max_words", data_config.max_words, 1)
    openers = {
        "sotu": _open_sotu,
        "files": _open_files,
        "lm1b": _open_lm1b,
        "tfds:lm1b": _open_tfds_lm1b,
    }
    if data_config.corpus not in openers:
        raise ValueError(
            f"`data.corpus` must be one of {sorted(openers)}. "
            f"Received: {data_config.corpus!r}"
        )
    sources = openers[data_config.corpus](data_config, workdir)
    return Corpus(sources, data_config.max_words)


def check_split(split: str) -> None:
    """Raises `ValueError` unless `split` is the name of a split."""
    if split not in SPLITS:
        raise ValueError(
            f"`split` must be one of {SPLITS}. Received: {split!r}"
        )


def _open_sotu(data_config, workdir):
    del data_config
    paths = sotu.write_sotu(os.path.join(workdir, "corpus"))
    return {
        split: [lines.TextFile(paths[split], "data.corpus")] for split in SPLITS
    }


def _open_files(data_config, workdir):
    del workdir
    sources = {
        split: lines.text_files(getattr(data_config, split), f"data.{split}")
        for split in SPLITS
    }
    trained = {os.path.realpath(file.path) for file in sources["train"]}
    for file in sources["validation"] + sources["test"]:
        if os.path.realpath(file.path) in trained:
            logging.warning(
                "`%s` names %s, which `data.train` names too: its perplexity "
                "says nothing about new text",
                file.field,
                file.path,
            )
    return sources


def _open_lm1b(data_config, workdir):
    del workdir
    if not os.path.isdir(data_config.path or ""):
        raise FileNotFoundError(
            "`data.path` must be the unpacked folder "
            "1-billion-word-language-modeling-benchmark-r13output. "
            f"Received: {data_config.path!r}"
        )
    names = {
        "train": [_LM1B_TRAIN.format(shard) for shard in range(1, 100)],
        "validation": [_LM1B_HELD_OUT.format(1)],
        "test": [_LM1B_HELD_OUT.format(0)],
    }
    return {
        split: [_lm1b_shard(data_config.path, name) for name in names[split]]
        for split in SPLITS
    }


def _lm1b_shard(folder: str, name: str) -> lines.TextFile:
    plain = os.path.join(folder, name)
    for path in (plain, plain + ".gz"):
        if os.path.exists(path):
            return lines.TextFile(path, "data.path")
    raise FileNotFoundError(
        f"`data.path` lacks a shard of the benchmark: {plain} (or .gz). "
        "Unpack all of it, or use `data.corpus`='files' for a part."
    )


def _open_tfds_lm1b(data_config, workdir):
    del workdir
    try:
        import tensorflow_datasets as tfds

        builder = tfds.builder("lm1b", data_dir=data_config.path or None)
        builder.download_and_prepare()  # returns at once if it is there
    except ImportError as error:
        raise ImportError(
            "`data.corpus`='tfds:lm1b' needs tensorflow_datasets and what it "
            f"imports ({error}). Install it with `pip install moe_tf[tfds]`."
        ) from error
    parts = {
        # Several sources, which passes can read in different orders.
        "train": [f"train[{p}%:{p + 5}%]" for p in range(0, 100, 5)],
        "validation": ["test[:50%]"],
        "test": ["test[50%:]"],
    }
    return {
        split: [_TfdsPart(builder, part) for part in parts[split]]
        for split in SPLITS
    }


@dataclasses.dataclass(frozen=True)
class _TfdsPart:
    """A slice of a split of tensorflow_datasets, one sentence an example."""

    builder: object
    part: str
    field: str = "data.corpus"

    @property
    def name(self) -> str:
        return f"{self.builder.info.full_name}/{self.part}"

    @property
    def place(self) -> str:
        return self.name

    @functools.cached_property
    def size(self) -> int:
        return int(self.builder.info.dataset_size or 0)

    def raw_lines(self) -> Iterator[bytes]:
        examples = self.builder.as_dataset(split=self.part, shuffle_files=False)
        for example in examples.as_numpy_iterator():
            yield example["text"]
