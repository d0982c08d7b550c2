"""Checkpoints that survive whatever kills the process."""

import hashlib
import json
import operator
import os
import re
import shutil

import tensorflow as tf
from absl import logging

from moe_tf import checks
from moe_tf import files
from moe_tf.distribute import MeshStrategy
from moe_tf.training.variables import list_some

# Files in the folder `step-<number>` of a checkpoint. A folder with `.old` is
# the checkpoint of its step while there is no folder without `.old`. A folder
# with `.tmp` was left by a killed process.
_VARIABLES = "variables"
_METADATA = "metadata.json"
_SUMS = "SHA256SUMS"
_FOLDER = re.compile(r"step-(\d{8}|[1-9]\d{8,})(\.old)?")
_LEFTOVER = re.compile(_FOLDER.pattern + r"\.tmp")


class DamagedCheckpointError(RuntimeError):
    """No checkpoint can be restored: files are damaged or missing."""


class Checkpoints:
    """Saves and restores variables in a folder of numbered checkpoints.

    A checkpoint holds whole (global) tensors, written by
    `tf.train.Checkpoint`, metadata in JSON, and SHA-256 sums of both, which
    `sha256sum -c SHA256SUMS` checks as well. The folder gets its name by a
    rename, once all its files are on the disk: a process killed at any moment
    leaves the old checkpoints or the old ones and the new one.

    One process at a time may save in a folder (see `claim_workdir`). Any
    number of processes may restore from the folder meanwhile. The folder is
    on a POSIX file system.

    Args:
        directory: the folder; the first `save` makes it.
        variables: dict of `tf.Variable`, DTensor variables included, by the
            names under which they are saved. See `variables.named_variables`.
        keep: int, number of checkpoints that stay. Defaults to `2`.
        strategy: optional `MeshStrategy` of the variables. If it spans
            several processes, all must save and restore, in the same file
            system, and the first one writes, from a copy of all variables.

    Raises:
        ValueError: no variables, or `keep` below 1.
        NotADirectoryError: `directory` is something else.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        variables: dict[str, tf.Variable],
        keep: int = 2,
        strategy: MeshStrategy | None = None,
    ):
        checks.at_least("keep", keep, 1)
        if not variables:
            raise ValueError("`variables` must not be empty.")
        self.directory = os.path.abspath(directory)
        if os.path.exists(directory) and not os.path.isdir(directory):
            raise NotADirectoryError(
                f"`directory` must be a folder. Received: {directory}"
            )
        self.keep = keep
        several = strategy is not None and strategy.num_processes > 1
        self._strategy = strategy if several else None
        self._variables = dict(variables)
        self._checkpoint = tf.train.Checkpoint(variables=self._variables)
        self._damaged = {}

    def steps(self) -> list[int]:
        """Returns the steps of all checkpoints, ascending, damaged or not."""
        return sorted(self._folders())

    def latest_step(self) -> int | None:
        """Returns the last of `steps`; None if there is no checkpoint."""
        return max(self._folders(), default=None)

    def save(self, step: int, metadata: dict | None = None) -> str:
        """Saves the variables as a checkpoint.

        Once the checkpoint is complete, all others are removed except the
        `keep - 1` before it. Checkpoints of later steps are removed too,
        because training continued from an earlier step; a warning names them
        unless `restore_latest` found them damaged. A checkpoint of the same
        step is replaced.

        Args:
            step: int, 0 or more.
            metadata: dict of plain data (what JSON holds), without the names
                `step` and `variables`.

        Returns:
            The checkpoint's folder.

        Raises:
            OSError: the disk is full, for example. The earlier checkpoints
                stay, and nothing is left of the new one.
            TypeError, ValueError: `step` or `metadata` cannot be saved.
                Nothing was changed.
        """
        step = operator.index(step)
        text = self._format_metadata(step, metadata or {})
        path = os.path.join(self.directory, f"step-{step:08d}")
        checkpoint = self._checkpoint
        if self._strategy is not None:
            copies = self._copy()
            if not self._strategy.is_first:
                return path
            checkpoint = tf.train.Checkpoint(variables=copies)
        last = self.latest_step()
        temporary = path + ".tmp"
        try:
            self._clean()
            try:
                self._write(temporary, text, checkpoint)
                self._publish(temporary, path)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
        except (OSError, tf.errors.OpError) as error:
            stands = f"step {last}" if last is not None else "none"
            raise OSError(
                f"Could not save step {step} in {self.directory}: {error}. "
                f"The last checkpoint there: {stands}. Free disk space or "
                "allow writing, then start again to go on from it."
            ) from error
        self._prune(step)
        return path

    def restore_latest(self) -> dict | None:
        """Restores the newest checkpoint that is not damaged.

        A warning names each damaged one. All files are verified before any
        variable changes.

        Returns:
            The metadata given to `save`, with `step`; None if there is no
            checkpoint.

        Raises:
            DamagedCheckpointError: there are checkpoints, all damaged.
            ValueError: names, shapes or dtypes of the checkpoint's variables
                are not those of `variables`.
        """
        self._damaged = {}
        while True:
            folders = self._folders()
            steps = [step for step in folders if step not in self._damaged]
            if not steps:
                break
            path = folders[max(steps)]
            inode = _find_inode(path)
            try:
                return self._restore(path)
            except DamagedCheckpointError as error:
                # A trainer may have removed or replaced it meanwhile.
                if inode is not None and inode == _find_inode(path):
                    logging.warning("Skipping a checkpoint. %s", error)
                    self._damaged[max(steps)] = str(error)
        if self._damaged:
            reasons = "\n  ".join(self._damaged.values())
            raise DamagedCheckpointError(
                f"All checkpoints are damaged:\n  {reasons}\nRestore one "
                f"from a copy, or move {self.directory} away to start afresh."
            )
        return None

    def restore(self, path: str | os.PathLike) -> dict:
        """Restores the checkpoint in the folder `path`.

        Returns and raises the same as `restore_latest`, and raises
        `FileNotFoundError` if there is no such folder.
        """
        path = os.fspath(path)
        if not os.path.isdir(path):
            raise FileNotFoundError(f"There is no checkpoint folder {path}.")
        return self._restore(path)

    def restore_step(self, step: int) -> dict:
        """Restores the checkpoint of a step.

        Raises:
            FileNotFoundError: there is no checkpoint of this step; otherwise
                see `restore`.
        """
        path = os.path.join(self.directory, f"step-{step:08d}")
        return self.restore(self._folders().get(step, path))

    def _folders(self):
        """Paths of the checkpoints by step."""
        try:
            # Not `isdir` afterwards: a trainer may have renamed it by then.
            with os.scandir(self.directory) as entries:
                names = sorted(
                    entry.name for entry in entries if entry.is_dir()
                )
        except FileNotFoundError:
            return {}
        found = {}
        for name in names:  # that with `.old` comes after that without
            match = _FOLDER.fullmatch(name)
            if match:
                path = os.path.join(self.directory, name)
                found.setdefault(int(match[1]), path)
        return found

    def _format_metadata(self, step, metadata):
        if step < 0:
            raise ValueError(f"`step` must be 0 or more. Received: {step}")
        taken = {"step", "variables"} & metadata.keys()
        if taken:
            raise ValueError(
                f"`metadata` must not hold {sorted(taken)}: `save` adds them."
            )
        content = {
            "step": step,
            **metadata,
            "variables": _describe_variables(self._variables),
        }
        return json.dumps(content, indent=1, sort_keys=True) + "\n"

    def _clean(self):
        """Makes the folder; removes what killed processes left in it."""
        if not os.path.isdir(self.directory):
            os.makedirs(self.directory, exist_ok=True)
            files.sync(os.path.dirname(self.directory))
        names = os.listdir(self.directory)
        for name in filter(_LEFTOVER.fullmatch, names):
            shutil.rmtree(os.path.join(self.directory, name))
        for name in names:
            match = _FOLDER.fullmatch(name)
            if not match or not match[2]:
                continue
            path = os.path.join(self.directory, name)
            whole = path.removesuffix(".old")
            if os.path.isdir(whole):
                # Renamed first: another process may be reading it.
                os.rename(path, path + ".tmp")
                shutil.rmtree(path + ".tmp")
            else:
                os.rename(path, whole)

    def _copy(self):
        """Copies of the variables, as whole tensors in this process."""
        fetch = self._strategy.fetch
        return {
            name: tf.Variable(fetch(variable))
            for name, variable in self._variables.items()
        }

    def _write(self, path, text, checkpoint):
        os.mkdir(path)
        checkpoint.write(os.path.join(path, _VARIABLES))
        files.write(os.path.join(path, _METADATA), text)
        files.write(os.path.join(path, _SUMS), _sum_files(path))
        for name in os.listdir(path):
            files.sync(os.path.join(path, name))
        files.sync(path)

    def _publish(self, temporary, path):
        # A folder that is not empty cannot be replaced in one step. Between
        # these two renames `.old` counts as the checkpoint.
        if os.path.isdir(path):
            os.rename(path, path + ".old")
        os.rename(temporary, path)
        files.sync(self.directory)

    def _prune(self, step):
        """Removes all but `step` and the `keep - 1` undamaged before it."""
        self._damaged.pop(step, None)
        folders = self._folders()
        later = [s for s in folders if s > step and s not in self._damaged]
        if later:
            logging.warning(
                "Removing the checkpoints of steps %s in %s: training went on "
                "from before them and has saved step %d.",
                sorted(later),
                self.directory,
                step,
            )
        kept = [s for s in folders if s <= step and s not in self._damaged]
        try:
            for old in folders.keys() - set(sorted(kept)[-self.keep :]):
                # Renamed first: half a checkpoint never has its name.
                os.rename(folders[old], folders[old] + ".tmp")
            self._clean()
        except OSError as error:
            logging.warning("Could not remove old checkpoints: %s", error)
        self._damaged.clear()

    def _restore(self, path):
        try:
            damage = _find_damage(path)
            if damage is not None:
                raise DamagedCheckpointError(f"Damaged: {path}: {damage}")
            with open(os.path.join(path, _METADATA), encoding="utf-8") as file:
                metadata = json.load(file)
            saved = metadata.pop("variables")
            _refuse_mismatch(path, saved, _describe_variables(self._variables))
            prefix = os.path.join(path, _VARIABLES)
            if self._strategy is None:
                self._checkpoint.read(prefix).assert_consumed()
            else:
                copies = self._copy()
                checkpoint = tf.train.Checkpoint(variables=copies)
                checkpoint.read(prefix).assert_consumed()
                for name, variable in self._variables.items():
                    self._strategy.assign(variable, copies[name])
        except (OSError, tf.errors.OpError) as error:
            raise DamagedCheckpointError(f"Damaged: {path}: {error}") from error
        return metadata


def _describe_variables(variables):
    return {
        name: {"shape": variable.shape.as_list(), "dtype": variable.dtype.name}
        for name, variable in variables.items()
    }


def _sum_files(path):
    """The output of `sha256sum variables.* metadata.json`."""
    names = sorted(
        name
        for name in os.listdir(path)
        if name == _METADATA or name.startswith(_VARIABLES + ".")
    )
    lines = []
    for name in names:
        with open(os.path.join(path, name), "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        lines.append(f"{digest}  {name}\n")
    return "".join(lines)


def _find_damage(path):
    """Names the files that differ from their sums; None if none does."""
    with open(os.path.join(path, _SUMS), "rb") as file:
        promised = file.read()
    found = _sum_files(path).encode()
    if promised == found:
        return None
    wrong = set(promised.split(b"\n")) ^ set(found.split(b"\n"))
    names = {line[66:].decode(errors="replace") for line in wrong} - {""}
    return f"{_SUMS} does not fit {', '.join(sorted(names)) or 'itself'}"


def _find_inode(path):
    try:
        return os.stat(path).st_ino
    except FileNotFoundError:
        return None


def _refuse_mismatch(path, saved, wanted):
    problems = {
        "only in the checkpoint": saved.keys() - wanted.keys(),
        "only in the model": wanted.keys() - saved.keys(),
        "of another shape or dtype": {
            "{name} ({0[dtype]} {0[shape]} saved, {1[dtype]} {1[shape]} "
            "wanted)".format(saved[name], wanted[name], name=name)
            for name in saved.keys() & wanted.keys()
            if saved[name] != wanted[name]
        },
    }
    lines = [
        f"  {problem}: {list_some(names)}"
        for problem, names in problems.items()
        if names
    ]
    if lines:
        raise ValueError(
            f"Checkpoint {path} is of another model or optimizer:\n"
            + "\n".join(lines)
            + "\nUse the config it was saved with, or another workdir."
        )
