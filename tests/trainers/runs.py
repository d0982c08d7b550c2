"""Runs of a trainer as users start them, killed or not, and their states."""

import dataclasses
import json
import pathlib
import signal
import sys
import time

import numpy as np
import tensorflow as tf

from tests import process

REPOSITORY = pathlib.Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Trainer:
    """A trainer with a config and flags, in processes of its own.

    Attributes:
        module: such as `"moe_tf_trainers.language_model"`.
        config: such as `"lm_demo.py:tiny"`.
        flags: what every call gets.
    """

    module: str
    config: str
    flags: tuple[str, ...] = ()

    def command(self, workdir, *flags):
        arguments = self.arguments(workdir, *flags)
        return [sys.executable, "-m", self.module, *arguments]

    def arguments(self, workdir, *flags):
        return [
            f"--config={REPOSITORY / 'configs' / self.config}",
            f"--workdir={workdir}",
            *self.flags,
            *flags,
        ]

    def run(self, workdir, *flags, stdin=b""):
        """Runs to the end; gives a `subprocess.CompletedProcess`."""
        arguments = self.arguments(workdir, *flags)
        return process.run_program(self.module, *arguments, stdin=stdin)

    def succeed(self, workdir, *flags, stdin=b""):
        """Runs to the end, and returns what was printed, in lines."""
        result = self.run(workdir, *flags, stdin=stdin)
        assert result.returncode == 0, result.stderr.decode()
        return result.stdout.decode().splitlines()

    def kill_at(self, workdir, moment):
        """Starts, and kills as soon as `moment(workdir)`."""
        code, _ = self.signal_at(workdir, moment, signal.SIGKILL)
        assert code == -signal.SIGKILL

    def signal_at(self, workdir, moment, number, *flags):
        """Starts, and sends a signal as soon as `moment(workdir)`.

        Returns:
            The exit code, and what was printed to standard error.
        """
        arguments = self.arguments(workdir, *flags)
        start = process.started_program(self.module, arguments)
        with start as (started, streams):
            deadline = time.monotonic() + 200
            while started.is_alive() and not moment(workdir):
                assert time.monotonic() < deadline
                time.sleep(0.0005)
            assert started.is_alive(), streams[2].read_text()
            started.signal(number)
            return started.wait(), streams[2].read_bytes()


def saved(step):
    """The moment when a step has been saved."""
    name = f"checkpoints/last/step-{step:08d}"
    return lambda workdir: (workdir / name).exists()


def writes(step):
    """The moment when a step is being written."""
    name = f"checkpoints/last/step-{step:08d}.tmp"
    return lambda workdir: (workdir / name).exists()


def state(workdir, step):
    """Every tensor of a step's checkpoint, and its metadata."""
    folder = workdir / f"checkpoints/last/step-{step:08d}"
    reader = tf.train.load_checkpoint(str(folder / "variables"))
    tensors = {
        name: reader.get_tensor(name)
        for name in reader.get_variable_to_shape_map()
        if name not in ("_CHECKPOINTABLE_OBJECT_GRAPH", "save_counter")
    }
    return tensors, json.loads((folder / "metadata.json").read_text())


def assert_same(got, want):
    """That two states have the same bits."""
    assert got[1] == want[1]
    assert got[0].keys() == want[0].keys()
    for name, tensor in want[0].items():
        np.testing.assert_array_equal(got[0][name], tensor, err_msg=name)
