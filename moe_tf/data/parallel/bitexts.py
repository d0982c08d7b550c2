"""Bitexts: parallel text in two languages, read line by line."""

import dataclasses
import functools
import itertools
import os
from collections.abc import Iterator
from typing import Protocol

from moe_tf.data import lines

RawPair = tuple[bytes | None, bytes | None]

# Stands for a line of the shorter side after its end.
_NO_LINE = object()


class Bitext(Protocol):
    """A part of a split of a language pair."""

    field: str  # the setting that named it, for messages
    places: tuple[str, str]  # where each side is, for messages
    sizes: list[tuple[str, int]]  # names without folders, and sizes

    def raw_pairs(self) -> Iterator[RawPair]:
        """Yields pairs in order; `None` for a line of too many bytes."""


@dataclasses.dataclass(frozen=True)
class TextFiles:
    """Two text files; line n of one translates line n of the other."""

    source: lines.TextFile
    target: lines.TextFile

    @property
    def field(self) -> str:
        return self.source.field

    @property
    def places(self) -> tuple[str, str]:
        return self.source.path, self.target.path

    @property
    def sizes(self) -> list[tuple[str, int]]:
        return [(file.name, file.size) for file in (self.source, self.target)]

    def raw_pairs(self) -> Iterator[RawPair]:
        """Yields pairs in order; `None` for a line of too many bytes.

        Raises:
            ValueError: the files have different numbers of lines, or one is
                a broken gzip file.
        """
        sides = [self.source.raw_lines(), self.target.raw_lines()]
        for number, pair in enumerate(
            itertools.zip_longest(*sides, fillvalue=_NO_LINE)
        ):
            if _NO_LINE not in pair:
                yield pair
                continue
            longer = 1 - pair.index(_NO_LINE)
            counts = [number, number]
            counts[longer] += 1 + sum(1 for _ in sides[longer])
            raise ValueError(
                f"`{self.field}` names {self.source.path} of {counts[0]} "
                f"lines and {self.target.path} of {counts[1]}. Line n of one "
                "must translate line n of the other: give both equally many."
            )


@dataclasses.dataclass(frozen=True)
class AlignedFolder:
    """One split of a folder that `libreoffice_help` wrote.

    `meta.tsv.gz` has the split of each line. An empty line of a language's
    `.txt.gz` has no translation.
    """

    folder: str
    source_language: str
    target_language: str
    split: str
    field: str = "data.path"

    @property
    def places(self) -> tuple[str, str]:
        return tuple(file.path for file in self._files[1:])

    @property
    def sizes(self) -> list[tuple[str, int]]:
        return [(file.name, file.size) for file in self._files]

    @functools.cached_property
    def _files(self) -> list[lines.TextFile]:
        names = ("meta.tsv.gz",) + tuple(
            f"{language}.txt.gz"
            for language in (self.source_language, self.target_language)
        )
        return [
            lines.TextFile(os.path.join(self.folder, name), self.field)
            for name in names
        ]

    def raw_pairs(self) -> Iterator[RawPair]:
        """Yields pairs in order; `None` for a line of too many bytes.

        Raises:
            ValueError: the files have different numbers of lines, or one is
                a broken gzip file.
        """
        wanted = self.split.encode()
        columns = [file.raw_lines() for file in self._files]
        for number, (meta, *pair) in enumerate(
            itertools.zip_longest(*columns, fillvalue=_NO_LINE), start=1
        ):
            if meta is _NO_LINE or _NO_LINE in pair:
                raise ValueError(
                    f"`{self.field}`: {', '.join(self.places)} and meta.tsv.gz "
                    f"beside them differ in their numbers of lines: one ends "
                    f"before line {number}. Prepare the folder again."
                )
            if meta is not None and meta.split(b"\t", 1)[0] == wanted:
                yield tuple(pair)


@dataclasses.dataclass(frozen=True)
class TfdsSplit:
    """A split of tensorflow_datasets whose examples are translations."""

    builder: object
    split: str
    source_language: str
    target_language: str
    field: str = "data.corpus"

    @property
    def places(self) -> tuple[str, str]:
        name = f"{self.builder.info.full_name}/{self.split}"
        return (
            f"{name}/{self.source_language}",
            f"{name}/{self.target_language}",
        )

    @property
    def sizes(self) -> list[tuple[str, int]]:
        size = int(self.builder.info.dataset_size or 0)
        return [(f"{self.builder.info.full_name}/{self.split}", size)]

    def raw_pairs(self) -> Iterator[RawPair]:
        examples = self.builder.as_dataset(
            split=self.split, shuffle_files=False
        )
        for example in examples.as_numpy_iterator():
            pair = (
                example[self.source_language],
                example[self.target_language],
            )
            yield tuple(
                line if len(line) < lines.MAX_LINE_BYTES else None
                for line in pair
            )
