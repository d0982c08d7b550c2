"""Files that are either whole or not there."""

import contextlib
import os
import uuid


@contextlib.contextmanager
def atomic_write(path):
    """Opens `path` for writing bytes; it appears whole when the block ends.

    The bytes go to a new file in the same folder, which then takes the name.
    A block that raises leaves `path` as it was, and nothing beside it.
    """
    folder, name = os.path.split(os.fspath(path))
    os.makedirs(folder or ".", exist_ok=True)
    partial = os.path.join(folder, f".{name}.{uuid.uuid4().hex}")
    try:
        with open(partial, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(partial)
        raise
