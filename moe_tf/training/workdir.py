"""A run's folder: one config for its whole life, one trainer at a time."""

import contextlib
import fcntl
import json
import os
import socket

from moe_tf import files

_CONFIG = "config.json"
_LOCK = ".lock"

# Locks are kept here too, so that dropping what `claim` returned does not
# close the file and with it silently release the folder.
_held = set()


class Claim:
    """The right to write a workdir; ends with the process at the latest.

    Use it as a context manager, or call `release`.
    """

    def __init__(self, file, path, text):
        self._file = file
        self._path = path
        self._text = text
        _held.add(self)

    def record(self) -> None:
        """Writes `config.json` unless it is there.

        To be called when the config has proved usable: a run that could not
        begin then leaves the workdir free for the corrected config.

        Raises:
            OSError: it cannot be written.
        """
        if not os.path.exists(self._path):
            with _explained(os.path.dirname(self._path)):
                files.write(self._path, self._text)

    def release(self) -> None:
        """Lets other trainers claim the workdir; a second call does nothing."""
        self._file.close()
        _held.discard(self)

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.release()


def claim(workdir, config, free=()) -> Claim:
    """Takes the workdir for this process and this config.

    Makes the folder if need be, locks `<workdir>/.lock` (`flock`, so the
    operating system frees it however the process ends) and compares the
    config with `<workdir>/config.json`, which `Claim.record` writes.

    Args:
        workdir: folder of the run.
        config: `ConfigDict` of plain data (what JSON holds).
        free: names of fields and groups that may differ, such as `"sample"`
            and `"train.steps"`.

    Returns:
        A `Claim`.

    Raises:
        OSError: the workdir is a file, or cannot be made or written.
        BlockingIOError: another process, or this one, has claimed it.
        ValueError: it belongs to a run of another config, or the config does
            not fit into JSON. Nothing was written but the folder and `.lock`.
    """
    workdir = os.fspath(workdir)
    text = _to_json(config)
    with _explained(workdir):
        os.makedirs(workdir, exist_ok=True)
        file = open(os.path.join(workdir, _LOCK), "a+", encoding="utf-8")
    try:
        _lock(file, workdir)
        path = os.path.join(workdir, _CONFIG)
        if os.path.exists(path):
            check(workdir, config, free)
    except BaseException:
        file.close()
        raise
    return Claim(file, path, text)


def check(workdir, config, free=()) -> None:
    """Raises unless the workdir belongs to a run of this config.

    A field that one of them does not have counts as None there, so that runs
    go on when a config gains fields that are None. Writes nothing and takes
    no lock, so it suits those who only read.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: the configs differ, field by field in the message, or the
            config of the workdir cannot be read.
    """
    path = os.path.join(workdir, _CONFIG)
    try:
        with open(path, encoding="utf-8") as file:
            then = _fields(json.load(file))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(
            f"No run in `workdir`={workdir}: there is no {path}. Train first, "
            "or name the workdir of a run."
        ) from error
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} is not the config that a run wrote ({error}). Restore "
            "the file, or use another workdir."
        ) from error
    now = _fields(json.loads(_to_json(config)))
    lines = [
        f"  {name}: {then.get(name, 'missing')} in the workdir, "
        f"{now.get(name, 'missing')} now"
        for name in sorted(then.keys() | now.keys())
        if then.get(name, "null") != now.get(name, "null")
        and not any(f"{name}.".startswith(f"{field}.") for field in free)
    ]
    if lines:
        raise ValueError(
            f"`workdir`={workdir} belongs to a run of another config:\n"
            + "\n".join(lines)
            + "\nUse another workdir, or the same config."
        )


@contextlib.contextmanager
def _explained(workdir):
    try:
        yield
    except OSError as error:
        kind = "not a folder" if os.path.isfile(workdir) else "not writable"
        raise OSError(
            f"`workdir`={workdir} is {kind} ({error}). Name a folder that "
            "this user may write, on a disk that is not full."
        ) from error


def _lock(file, workdir):
    """Locks the file and writes into it who holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read().strip() or "a process that has just started"
        raise BlockingIOError(
            f"`workdir`={workdir} is in use by {holder}. Wait for that to "
            "end, stop it, or use another workdir."
        ) from error
    except OSError as error:
        raise OSError(
            f"`workdir`={workdir} cannot be locked ({error}). Use a file "
            "system that has `flock`."
        ) from error
    with _explained(workdir):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()


def _to_json(config):
    try:
        text = json.dumps(config.to_dict(), indent=2, sort_keys=True)
    except TypeError as error:
        raise ValueError(
            "`config` must hold plain data: numbers, texts, booleans, None, "
            f"lists and dicts of them. {error}. Received:\n{config}"
        ) from error
    return text + "\n"


def _fields(tree, prefix=""):
    """Dotted names of the leaves, and their values as JSON."""
    fields = {}
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            fields.update(_fields(value, f"{prefix}{name}."))
        else:
            fields[prefix + name] = json.dumps(value, sort_keys=True)
    return fields
