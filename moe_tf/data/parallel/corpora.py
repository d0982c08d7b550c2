"""Opens the parallel corpora that `config.data` names."""

import codecs
import collections
import dataclasses
import glob
import itertools
import math
import os
import re
from collections.abc import Iterator

import ml_collections
from absl import logging

from moe_tf.data import lines
from moe_tf.data.parallel import bitexts
from moe_tf.data.parallel import libreoffice_help
from moe_tf.data.text import corpora

SPLITS = corpora.SPLITS

# So that in en-pt-BR the first hyphen is between the languages.
_LANGUAGE = r"[a-z][A-Za-z0-9_]*(?:-[A-Z0-9][A-Za-z0-9_]*)*"
_PAIR = re.compile(rf"({_LANGUAGE})-({_LANGUAGE})(?::(.*))?")


@dataclasses.dataclass(frozen=True)
class Pair:
    """A language pair: a source and a target language.

    Attributes:
        source: name of the source language, such as `"en"`.
        target: name of the target language, such as `"pt-BR"`.
        weight: weight of the pair in training, relative to the other pairs;
            `None` stands for the number of its sentences.
    """

    source: str
    target: str
    weight: float | None = None

    @property
    def name(self) -> str:
        return f"{self.source}-{self.target}"


@dataclasses.dataclass(frozen=True)
class ParallelCorpus:
    """Pairs of sentences in three splits.

    Attributes:
        pairs: the language pairs, in order.
        bitexts: list of `bitexts.Bitext`s by name of a pair and split.
    """

    pairs: list[Pair]
    bitexts: dict[tuple[str, str], list[bitexts.Bitext]]

    def pair(self, name: str) -> Pair:
        """Returns the language pair of a name.

        Raises:
            ValueError: there is no such pair.
        """
        for pair in self.pairs:
            if pair.name == name:
                return pair
        raise ValueError(
            f"`pair` must be one of {[pair.name for pair in self.pairs]}. "
            f"Received: {name!r}"
        )

    def lines(
        self,
        pair: Pair,
        split: str,
        report: lines.LineReport | None = None,
    ) -> Iterator[tuple[bytes, bytes]]:
        """Yields the usable sentence pairs of a split.

        A pair is skipped and counted if one side is blank, is not UTF-8 or
        has over `lines.MAX_LINE_BYTES` bytes. Lines end only with `\\n` or
        `\\r\\n`.

        Args:
            pair: one of `pairs`.
            split: `"train"`, `"validation"` or `"test"`.
            report: optional `LineReport` to count in.

        Yields:
            Source and target as bytes of UTF-8, without leading or trailing
            ASCII whitespace.

        Raises:
            ValueError: files differ in their numbers of lines, are broken,
                or have no usable pair.
        """
        corpora.check_split(split)
        report = lines.LineReport() if report is None else report
        for bitext in self.bitexts[pair.name, split]:
            for _, both in _usable(bitext, report):
                yield both

    def texts(self, split: str) -> Iterator[bytes]:
        """Yields the usable lines of both sides of all pairs.

        A text that several pairs share, such as the English of en-de and
        en-fr, is read once.
        """
        # For each text, a byte for each line: 1 if it was yielded.
        read = collections.defaultdict(bytearray)
        for bitext in itertools.chain.from_iterable(
            self.bitexts[pair.name, split] for pair in self.pairs
        ):
            marks = [read[place] for place in bitext.places]
            for number, both in _usable(bitext, lines.LineReport()):
                for line, seen in zip(both, marks, strict=True):
                    seen.extend(bytes(max(0, number + 1 - len(seen))))
                    if not seen[number]:
                        seen[number] = True
                        yield line

    def sizes(self, pair: Pair, split: str) -> list[tuple[str, int]]:
        """Returns name and size of every source of a split, in order."""
        return [
            named
            for bitext in self.bitexts[pair.name, split]
            for named in bitext.sizes
        ]


def open_parallel(
    data_config: ml_collections.ConfigDict, workdir: str
) -> ParallelCorpus:
    """Opens the corpus `data_config.corpus` for `data_config.pairs`.

    | `corpus` | text |
    | --- | --- |
    | `"libreoffice-help"` | the folder `path`, or one made under `workdir` from Debian's packages, see `moe_tf.data.parallel.libreoffice_help` |
    | `"files"` | the files that `train`, `validation` and `test` name: `{lang}` stands for a language, `{pair}` for the pair, in either order, `{path}` for `path` |
    | `"tfds:NAME"` | a translation set of tensorflow_datasets, such as `tfds:wmt14_translate/fr-en`, kept in `path` if given |

    Args:
        data_config: has `corpus`, `pairs` and the fields in the table.
            Examples of `pairs` are `"en-de,de-en"`, and with weights
            `"en-de:2,en-fr:1"`.
        workdir: folder of the run.

    Raises:
        FileNotFoundError: a file is missing.
        ImportError: the package of the corpus is not installed.
        ValueError: a setting cannot be used.
    """  # noqa: E501
    pairs = parse_pairs(data_config.pairs)
    name = data_config.corpus
    if name == "files":
        opened = _open_files(data_config, pairs)
    elif name == "libreoffice-help":
        opened = _open_libreoffice_help(data_config, pairs, workdir)
    elif name.startswith("tfds:"):
        opened = _open_tfds(data_config, pairs)
    else:
        raise ValueError(
            "`data.corpus` must be 'libreoffice-help', 'files' or 'tfds:' "
            f"and a name. Received: {name!r}"
        )
    return ParallelCorpus(pairs, opened)


def parse_pairs(pairs: str) -> list[Pair]:
    """Parses the language pairs of `data.pairs`.

    Args:
        pairs: such as `"en-de,en-pt-BR"`, or with weights
            `"en-de:2,en-pt-BR:1"`.

    Raises:
        ValueError: there is no pair, a pair is listed twice, is not of two
            languages, or has a weight that is not above 0; or only some pairs
            have a weight.
    """
    parsed = []
    for part in filter(None, map(str.strip, (pairs or "").split(","))):
        pair = _parse_pair(part)
        if pair.name in [other.name for other in parsed]:
            raise ValueError(
                f"`data.pairs` lists {pair.name} twice. Received: {pairs!r}"
            )
        parsed.append(pair)
    if not parsed:
        raise ValueError(
            "`data.pairs` must list at least one language pair, such as "
            f"'en-de' or 'en-de,en-fr'. Received: {pairs!r}"
        )
    if len({pair.weight is None for pair in parsed}) > 1:
        raise ValueError(
            "`data.pairs` must give all pairs a weight or none, whose weight "
            f"is the number of their sentences. Received: {pairs!r}"
        )
    return parsed


def _parse_pair(text):
    match = _PAIR.fullmatch(text)
    if not match:
        raise ValueError(
            "`data.pairs` must list pairs such as en-de, en-pt-BR or "
            "en-de:0.5; a language begins with a small letter, what follows "
            f"its hyphens does not. Received: {text!r}"
        )
    source, target, weight = match.groups()
    if source == target:
        raise ValueError(
            f"`data.pairs` must list pairs of two languages. Received: {text!r}"
        )
    if weight is None:
        return Pair(source, target)
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(
            "`data.pairs` must have weights that are finite and above 0. "
            f"Received: {text!r}"
        )
    return Pair(source, target, value)


def _usable(bitext, report):
    """Yields the line number and both sides of each usable pair."""
    before = report.lines
    for number, pair in enumerate(bitext.raw_pairs(), start=1):
        if number == 1:
            pair = tuple(
                raw and raw.removeprefix(codecs.BOM_UTF8) for raw in pair
            )
        for raw, place in zip(pair, bitext.places, strict=True):
            if reason := _reason_to_skip(raw):
                report.skip(reason, f"{place}:{number}")
                break
        else:
            report.lines += 1
            yield number, (pair[0].strip(), pair[1].strip())
    if report.lines == before:
        raise ValueError(
            f"`{bitext.field}` names {' and '.join(bitext.places)}, which "
            "have no usable pair: both sides of a line need UTF-8 that is "
            f"not blank. Skipped so far: {report.skipped}"
        )


def _reason_to_skip(raw):
    if raw is None:
        return lines.TOO_LONG
    try:
        return None if raw.decode("utf-8").strip() else lines.BLANK
    except UnicodeDecodeError:
        return lines.NOT_UTF8


def _open_files(data_config, pairs):
    opened = {
        (pair.name, split): _text_files(data_config, pair, split)
        for pair in pairs
        for split in SPLITS
    }
    trained = {
        os.path.realpath(place)
        for (_, split), parts in opened.items()
        for part in parts
        for place in part.places
        if split == "train"
    }
    for (_, split), parts in opened.items():
        for place in (place for part in parts for place in part.places):
            if split != "train" and os.path.realpath(place) in trained:
                logging.warning(
                    "`data.%s` names %s, which `data.train` names too: it "
                    "says nothing about new text",
                    split,
                    place,
                )
    return opened


def _text_files(data_config, pair, split):
    field = f"data.{split}"
    patterns = getattr(data_config, split) or ""
    patterns = patterns.replace("{path}", data_config.path or ".")
    if not all("{lang}" in pattern for pattern in patterns.split(",")):
        raise ValueError(
            f"`{field}` must name files with {{lang}} in place of the "
            f"language, such as 'text/{split}.{{lang}}.gz'. "
            f"Received: {patterns!r}"
        )
    sides = [
        lines.text_files(_filled(patterns, pair, language), field)
        for language in (pair.source, pair.target)
    ]
    if len(sides[0]) != len(sides[1]):
        raise ValueError(
            f"`{field}` names {len(sides[0])} files in {pair.source} and "
            f"{len(sides[1])} in {pair.target}. Received: {patterns!r}"
        )
    return [bitexts.TextFiles(*files) for files in zip(*sides, strict=True)]


def _filled(patterns, pair, language):
    """Fills in a language and the pair, in the order that files have."""
    filled = []
    for pattern in patterns.replace("{lang}", language).split(","):
        names = [pair.name, f"{pair.target}-{pair.source}"]
        both = [pattern.replace("{pair}", name) for name in names]
        there = [text for text in both if glob.glob(text.strip())]
        filled.append((there or both)[0])
    return ",".join(filled)


def _open_libreoffice_help(data_config, pairs, workdir):
    languages = sorted(
        {x for pair in pairs for x in (pair.source, pair.target)}
    )
    folder = data_config.path
    if not folder:
        folder = os.path.join(workdir, "corpus")
        libreoffice_help.write_corpus(languages, folder)
    for language in languages:
        libreoffice_help.check_language(language, folder)
    names = {"train": "train", "validation": "dev", "test": "test"}
    return {
        (pair.name, split): [
            bitexts.AlignedFolder(
                folder, pair.source, pair.target, names[split]
            )
        ]
        for pair in pairs
        for split in SPLITS
    }


def _open_tfds(data_config, pairs):
    name = data_config.corpus.removeprefix("tfds:")
    try:
        import tensorflow_datasets as tfds

        builder = tfds.builder(name, data_dir=data_config.path or None)
        builder.download_and_prepare()  # returns at once if it is there
    except ImportError as error:
        raise ImportError(
            f"`data.corpus`={data_config.corpus!r} needs tensorflow_datasets "
            f"and what it imports ({error}). Install it with "
            "`pip install moe_tf[tfds]`."
        ) from error
    for pair in pairs:
        for language in (pair.source, pair.target):
            if language not in builder.info.features:
                raise ValueError(
                    f"`data.pairs` names {language!r}, but {name} has "
                    f"{sorted(builder.info.features)}."
                )
    if missing := [
        split for split in SPLITS if split not in builder.info.splits
    ]:
        raise ValueError(
            f"`data.corpus`={data_config.corpus!r} lacks the splits "
            f"{missing}; it has {sorted(builder.info.splits)}. Write it to "
            "files and use `data.corpus`='files'."
        )
    return {
        (pair.name, split): [
            bitexts.TfdsSplit(builder, split, pair.source, pair.target)
        ]
        for pair in pairs
        for split in SPLITS
    }
