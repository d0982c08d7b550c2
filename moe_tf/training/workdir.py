"""Folders of runs: one config for a run's life, one trainer at a time."""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Collection
from typing import TextIO

import ml_collections

from moe_tf import files

# Names that fields had before there was a group `moe`, and their present
# names. Workdirs of that time have the old names in `config.json`.
RENAMED_FIELDS = {
    "model.k": "moe.k",
    "model.expert_hidden": "moe.hidden_units",
    "model.gating": "moe.gating",
    "model.importance_weight": "moe.importance_weight",
    "model.load_weight": "moe.load_weight",
    "model.capacity_factor": "moe.capacity_factor",
    "model.num_groups": "moe.num_groups",
    "model.recompute": "moe.recompute",
}

_CONFIG = "config.json"
_LOCK = ".lock"

# Claims are referred to from here too. Otherwise dropping the result of
# `claim_workdir` would close the file, which silently releases the folder.
_held = set()


class Claim:
    """The right to write a workdir; ends with the process at the latest.

    Use it as a context manager, or call `release`.
    """

    def __init__(self, file: TextIO, path: str, text: str):
        self._file = file
        self._path = path
        self._text = text
        _held.add(self)

    def record(self) -> None:
        """Writes `config.json` unless it exists.

        To be called when the config has proved usable: a run that could not
        begin then leaves the workdir free for the corrected config.

        Raises:
            OSError: the file cannot be written.
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

    def __exit__(self, *unused) -> None:
        self.release()


def claim_workdir(
    workdir: str | os.PathLike,
    config: ml_collections.ConfigDict,
    free: Collection[str] = (),
) -> Claim:
    """Claims the workdir for this process and this config.

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
        BlockingIOError: another process, or this one, has claimed the workdir.
        ValueError: the workdir belongs to a run of another config, or the
            config does not fit into JSON. Nothing was written except the
            folder and `.lock`.
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
            check_workdir(workdir, config, free)
    except BaseException:
        file.close()
        raise
    return Claim(file, path, text)


def check_workdir(
    workdir: str | os.PathLike,
    config: ml_collections.ConfigDict,
    free: Collection[str] = (),
) -> None:
    """Checks that the workdir belongs to a run of this config.

    A field that one of the two configs does not have counts as None there: a
    run continues when its config gains fields that are None. Fields that have
    been renamed since are read by their new names, see `RENAMED_FIELDS`.
    Nothing is written or locked, so modes that only read can call this.

    Args:
        workdir: folder of the run.
        config: `ConfigDict` of plain data (what JSON holds).
        free: names of fields and groups that may differ.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: the configs differ, field by field in the message, or the
            config of the workdir cannot be read.
    """
    path = os.path.join(workdir, _CONFIG)
    try:
        with open(path, encoding="utf-8") as file:
            then = rename_fields(_flatten(json.load(file)))
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
    now = _flatten(json.loads(_to_json(config)))
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


def rename_fields(fields: dict[str, str]) -> dict[str, str]:
    """Gives the fields of an older config their present names.

    Args:
        fields: dict from dotted names such as `"model.k"` to values.
    """
    return {
        RENAMED_FIELDS.get(name, name): value for name, value in fields.items()
    }


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


def _flatten(tree, prefix=""):
    """Dotted names of the leaves, and their values as JSON."""
    fields = {}
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            fields.update(_flatten(value, f"{prefix}{name}."))
        else:
            fields[prefix + name] = json.dumps(value, sort_keys=True)
    return fields
