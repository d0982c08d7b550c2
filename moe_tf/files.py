"""Files that are whole or not there, whatever kills the process."""

import contextlib
import os


def write_atomically(path, text: str) -> None:
    """Replaces the file at `path` by one that holds `text`, in UTF-8.

    A process killed at any moment leaves the old file or the new one. What
    it may leave besides is a `<path>.<pid>.tmp`, which nothing reads.

    Args:
        path: where; its folder exists.
        text: what.

    Raises:
        OSError: the folder cannot be written, or the disk is full; the old
            file stands.
    """
    path = os.fspath(path)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise
    sync(os.path.dirname(path) or ".")


def sync(path) -> None:
    """Waits until the file, or the entries of the folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
