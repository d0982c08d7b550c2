"""Atomic writing of files: whole or not there, whatever kills the process."""

import contextlib
import os
from collections.abc import Iterator
from typing import BinaryIO


@contextlib.contextmanager
def replace(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Opens a binary file for writing, renamed to `path` once it is complete.

    A process killed at any moment leaves the old file or the new one, and
    perhaps a `<path>.<pid>.tmp`, which nothing reads. A block that raises
    leaves the old file and nothing else.

    Args:
        path: of the file, in an existing folder.

    Yields:
        The open file.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    path = os.fspath(path)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise
    sync(os.path.dirname(path) or ".")


def write(path: str | os.PathLike, text: str) -> None:
    """Replaces the file at `path` by `text` in UTF-8."""
    with replace(path) as file:
        file.write(text.encode())


def sync(path: str | os.PathLike) -> None:
    """Waits until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
