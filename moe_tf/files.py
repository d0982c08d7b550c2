"""Files that are whole or not there, whatever kills the process."""

import contextlib
import os


@contextlib.contextmanager
def replace(path):
    """Opens a file for writing bytes; it takes the name `path` when whole.

    A process killed at any moment leaves the old file or the new one. What
    it may leave besides is a `<path>.<pid>.tmp`, which nothing reads. A block
    that raises leaves the old file and nothing beside it.

    Args:
        path: where; its folder exists.

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


def write(path, text: str) -> None:
    """Replaces the file at `path` by one that holds `text`, in UTF-8."""
    with replace(path) as file:
        file.write(text.encode())


def sync(path) -> None:
    """Waits until the file, or the entries of the folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
