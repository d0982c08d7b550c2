"""Lines of plain or gzipped text files, one sentence a line."""

import codecs
import dataclasses
import functools
import glob
import gzip
import io
import os
import zlib
from collections.abc import Iterable
from collections.abc import Iterator
from typing import BinaryIO
from typing import Protocol

from absl import logging

# A longer line is skipped without being held in memory.
MAX_LINE_BYTES = 1 << 20

BLANK = "blank"
NOT_UTF8 = "not_utf8"
TOO_LONG = "too_long"


@dataclasses.dataclass
class LineReport:
    """Counts of the lines read so far.

    Attributes:
        lines: number of usable lines.
        skipped: number of skipped lines by reason.
        first: first skipped line by reason, as `file:line`.
    """

    lines: int = 0
    skipped: dict[str, int] = dataclasses.field(
        default_factory=lambda: {BLANK: 0, NOT_UTF8: 0, TOO_LONG: 0}
    )
    first: dict[str, str] = dataclasses.field(default_factory=dict)

    def skip(self, reason: str, place: str) -> None:
        """Counts a skipped line, at `place`, such as `file:line`."""
        self.skipped[reason] += 1
        self.first.setdefault(reason, place)

    def log(self, split: str) -> None:
        """Logs a warning for every reason but blank lines."""
        for reason, count in self.skipped.items():
            if count and reason != BLANK:
                logging.warning(
                    "%s: %d of %d lines skipped as %s, the first at %s",
                    split,
                    count,
                    self.lines + sum(self.skipped.values()),
                    reason,
                    self.first[reason],
                )


class Source(Protocol):
    """A part of a split, such as a file."""

    name: str  # recorded beside the counts, so without folders
    size: int
    field: str  # the setting that named it, for messages
    place: str  # where it is, for messages

    def raw_lines(self) -> Iterator[bytes | None]:
        """Yields lines in order; `None` for one over `MAX_LINE_BYTES`."""


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A text file, gzipped if its name ends in `.gz`."""

    path: str
    field: str

    @property
    def name(self) -> str:
        return os.path.basename(self.path)

    @property
    def place(self) -> str:
        return self.path

    @functools.cached_property
    def size(self) -> int:
        return os.path.getsize(self.path)

    def raw_lines(self) -> Iterator[bytes | None]:
        try:
            with self._open() as file:
                yield from bounded_lines(file)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(
                f"`{self.field}` names {self.path}, which is not a whole gzip "
                f"file ({error}). Copy it again, or drop `.gz` from its name "
                "if it is plain text."
            ) from error

    def _open(self):
        if self.path.endswith(".gz"):
            return io.BufferedReader(gzip.open(self.path, "rb"))
        return open(self.path, "rb")


def text_files(patterns: str, field: str) -> list[TextFile]:
    """Returns the files of comma-separated names and globs, in order.

    Args:
        patterns: such as `"news.txt,more/*.gz"`. Files of a glob are sorted.
        field: name of the setting, for messages.

    Raises:
        FileNotFoundError: a name without wildcards does not exist.
        ValueError: there is no name, a glob matches no file, a name is that
            of a folder, or a file is named twice.
    """
    paths = []
    for pattern in filter(None, map(str.strip, (patterns or "").split(","))):
        paths += _matches(pattern, field)
    if not paths:
        raise ValueError(
            f"`{field}` must name at least one text file. "
            f"Received: {patterns!r}"
        )
    for index, path in enumerate(paths):
        if os.path.isdir(path):
            raise ValueError(
                f"`{field}` must name files, but {path} is a folder. Write "
                f"{os.path.join(path, '*')} for the files inside."
            )
        if path in paths[:index]:
            raise ValueError(
                f"`{field}` names {path} twice. Received: {patterns!r}"
            )
    return [TextFile(path, field) for path in paths]


def usable_lines(
    sources: Iterable[Source],
    max_words: int,
    report: LineReport | None = None,
) -> Iterator[bytes]:
    """Yields the usable sentences of `sources`.

    Words are separated by ASCII whitespace, as in `tf.strings.split`. Skipped
    and counted are blank lines, lines that are not UTF-8, and lines of more
    than `max_words` words or `MAX_LINE_BYTES` bytes. A byte order mark before
    the first line is dropped.

    Args:
        sources: read one after the other.
        max_words: maximal number of words in a sentence.
        report: optional `LineReport` to count in.

    Yields:
        One line as bytes of UTF-8, with its line end.

    Raises:
        ValueError: a source is a broken gzip file or has no usable line.
    """
    report = LineReport() if report is None else report
    for source in sources:
        before = report.lines
        for number, raw in enumerate(source.raw_lines(), start=1):
            if number == 1 and raw is not None:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            reason = reason_to_skip(raw, max_words)
            if reason is None:
                report.lines += 1
                yield raw
            else:
                report.skip(reason, f"{source.place}:{number}")
        if report.lines == before:
            raise ValueError(
                f"`{source.field}` names {source.place}, which has no usable "
                "line: a line needs UTF-8 and 1 to "
                f"`data.max_words`={max_words} words. Remove the file or "
                f"raise the limit. Skipped so far: {report.skipped}"
            )


def reason_to_skip(raw: bytes | None, max_words: int) -> str | None:
    """Returns the reason to skip a line; `None` if it is usable."""
    if raw is None:
        return TOO_LONG
    num_words = len(raw.split())
    if not num_words:
        return BLANK
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return NOT_UTF8
    return TOO_LONG if num_words > max_words else None


def bounded_lines(file: BinaryIO) -> Iterator[bytes | None]:
    """Yields lines of a file; `None` for one over `MAX_LINE_BYTES`."""
    while raw := file.readline(MAX_LINE_BYTES):
        if len(raw) < MAX_LINE_BYTES or raw.endswith(b"\n"):
            yield raw
            continue
        while rest := file.readline(MAX_LINE_BYTES):
            if rest.endswith(b"\n"):
                break
        yield None


def _matches(pattern: str, field: str) -> list[str]:
    if os.path.exists(pattern):
        return [pattern]
    if glob.has_magic(pattern):
        if paths := sorted(glob.glob(pattern, recursive=True)):
            return paths
        raise ValueError(
            f"`{field}` has a pattern that matches no file: {pattern}. "
            "Correct it, or make the files first."
        )
    raise FileNotFoundError(
        f"`{field}` names a file that does not exist: {pattern}. Correct the "
        f"path; relative paths start at {os.getcwd()}."
    )
