"""A run of two processes loses one, and goes on in one."""

import csv
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.trainers import runs

TRAINER = runs.Trainer(
    "moe_tf_trainers.language_model",
    "lm_demo.py:tiny",
    (
        "--config.moe.num_groups=8",
        "--config.moe.capacity_factor=1.25",
        "--config.train.steps=6",
    ),
)
ON_TWO = "--config.mesh.batch=2"
LAUNCH = [
    *(sys.executable, "-m", "moe_tf_trainers.launch"),
    *("--num_processes=2", "--grace_seconds=5", "--"),
]


def history(workdir):
    with open(workdir / "history.csv") as file:
        rows = list(csv.DictReader(file))
    names = ("perplexity", "val_perplexity", "moe_dropped_fraction")
    return [[float(row[name]) for name in names] for row in rows]


def second_process(launcher):
    """The process that holds the second place of the cluster."""
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes()
            status = (folder / "status").read_text()
        except OSError:
            continue
        child = f"PPid:\t{launcher.pid}\n" in status
        if child and b'"index": 1' in environment:
            return int(folder.name)
    raise AssertionError("there is no second process")


@pytest.mark.thorough
def test_a_killed_run_of_two_processes_goes_on_in_one(tmp_path, seed_corpus):
    whole, cut = (seed_corpus(tmp_path / name) for name in ("whole", "cut"))
    TRAINER.succeed(whole)
    command = [*LAUNCH, *TRAINER.command(cut, ON_TWO)]
    with open(tmp_path / "printed", "w+") as printed:
        launcher = subprocess.Popen(
            command, cwd=runs.REPOSITORY, stdout=printed, stderr=printed
        )
        try:
            saved = cut / "checkpoints" / "last" / "step-00000002"
            end = time.monotonic() + 200
            while not saved.exists():
                assert launcher.poll() is None and time.monotonic() < end
                time.sleep(0.05)
            os.kill(second_process(launcher), signal.SIGKILL)
            assert launcher.wait(60) == 128 + signal.SIGKILL
        finally:
            launcher.kill()
            launcher.wait()
    text = (tmp_path / "printed").read_text()
    assert "process 1 of 2 was ended by SIGKILL; ending the others" in text

    again = TRAINER.succeed(cut, ON_TWO)
    assert any("Going on from step" in line for line in again)
    rows = history(cut)
    # A step may be in the history and not saved: it was done once more.
    assert len(rows) in (6, 7)
    for want, got in zip(history(whole)[-3:], rows[-3:], strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
    # Process 0, and the one that went on; process 1 has written nothing.
    writers = {path.name.split(".")[-3] for path in cut.rglob("events.*")}
    assert len(writers) == 2
