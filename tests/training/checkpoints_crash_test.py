"""Kills, a full disk, and readers beside a trainer."""

import contextlib
import itertools
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time

import pytest

from tests import sets
from tests.training.checkpoints_test import damage
from tests.training.checkpoints_test import fill
from tests.training.checkpoints_test import opened
from tests.training.checkpoints_test import save
from tests.training.checkpoints_test import value_of

# Children are forked from a process that has imported TensorFlow but not yet
# used it, so that one costs a fraction of a second.
_CHILDREN = multiprocessing.get_context("forkserver")
_CHILDREN.set_forkserver_preload(["tensorflow", "keras"])


@contextlib.contextmanager
def child(function, *arguments):
    """A process that sends what `function` gives to the yielded pipe."""
    ours, theirs = _CHILDREN.Pipe()
    process = _CHILDREN.Process(target=function, args=(*arguments, theirs))
    process.start()
    theirs.close()
    try:
        yield process, ours
    finally:
        process.kill()
        process.join()
        ours.close()


def _lay_out(directory, saved):
    """Saves `(step, value)`s; a value below 0 is a damaged one's."""
    for step, value in saved:
        path = save(directory, step, value, keep=9)
        if value < 0:
            damage(path)


_EVENTS = []  # called at each; an audit hook cannot be taken away


def _audit(name, arguments):
    if _EVENTS and name.startswith(("os.", "open", "shutil.")):
        _EVENTS[0]()


sys.addaudithook(_audit)


@pytest.mark.parametrize(
    "keep,saved,step,old",
    [
        sets.thorough(1, [(1, 1)], 2, (1, 1)),
        (2, [(1, 1), (2, 2)], 3, (2, 2)),
        (1, [(3, 1)], 3, (3, 1)),
        sets.thorough(2, [(1, 1), (3, 2)], 3, (3, 2)),
        (1, [(1, 1), (3, -1)], 3, (1, 1)),
        sets.thorough(1, [(1, 1), (9, -1)], 3, (1, 1)),
    ],
)
def test_a_kill_at_any_call_leaves_old_or_new(tmp_path, keep, saved, step, old):
    directory, copies = tmp_path / "live", tmp_path / "copies"
    _lay_out(directory, saved)
    saver, variables = opened(directory, keep=keep)
    assert saver.restore_latest() == {"step": old[0]}
    fill(variables, 7)

    def copy():  # what a kill before this call would leave
        _EVENTS.clear()
        shutil.copytree(directory, copies / str(len(seen)))
        seen.append(None)
        _EVENTS.append(copy)

    seen = []
    _EVENTS.append(copy)
    try:
        saver.save(step)
    finally:
        _EVENTS.clear()
    assert len(seen) > 20
    found = []
    for number in range(len(seen)):
        # What another process reads under the name of a checkpoint is whole.
        for folder in (copies / str(number)).glob("*[!p]"):
            assert len(os.listdir(folder)) >= 4, folder
        saver, variables = opened(copies / str(number), keep=keep)
        metadata = saver.restore_latest()
        found.append((metadata["step"], value_of(variables)))
        fill(variables, 8)
        saver.save(10)
        names = os.listdir(copies / str(number))
        assert all("." not in name for name in names), names
        assert len(names) <= keep
    turn = found.index((step, 7))
    assert found == [old] * turn + [(step, 7)] * (len(found) - turn)
    assert turn > 0


def _save_forever(directory, keep, pipe):
    saver, variables = opened(directory, keep=keep)
    found = saver.restore_latest() or {"step": 0}
    for count in itertools.count(2 * found["step"] + 2):
        step = count // 2  # each step twice, so that replacing is met too
        fill(variables, step)
        saver.save(step)
        pipe.send(step)


@pytest.mark.thorough
def test_real_kills_lose_nothing_that_was_saved(tmp_path):
    draw = random.Random(0)
    reached = []
    for _ in range(10):
        with child(_save_forever, tmp_path, 2) as (process, pipe):
            for _ in range(5):  # At least three steps, on any machine.
                reported = pipe.recv()
            time.sleep(draw.uniform(0, 0.2))
            process.kill()
            process.join()
            with contextlib.suppress(EOFError):
                while True:
                    reported = pipe.recv()
        saver, variables = opened(tmp_path)
        step = saver.restore_latest()["step"]
        assert step in (reported, reported + 1)
        assert value_of(variables) == step
        assert len(saver.steps()) <= 3
        reached.append(step)
    assert reached == sorted(set(reached))
    assert reached[-1] > 20


def test_reads_while_another_process_saves(tmp_path, caplog):
    saver, variables = opened(tmp_path, keep=1)
    steps = []
    with child(_save_forever, tmp_path, 1) as (_, pipe):
        pipe.recv()
        start = time.monotonic()
        while (took := time.monotonic() - start) < 120:
            if took > 2 and len(set(steps)) > 10:
                break
            steps.append(saver.restore_latest()["step"])
            assert value_of(variables) == steps[-1]
    assert steps == sorted(steps)
    assert len(set(steps)) > 10
    assert caplog.text == ""


def _fill_the_disk(directory, limit, metadata, pipe):
    saver, variables = opened(directory, 1)
    saver.save(1)
    fill(variables, 2)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        saver.save(2, metadata)
    except OSError as error:
        pipe.send(str(error))
    else:
        pipe.send("saved")
    pipe.send(os.listdir(directory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    saver.save(2, metadata)
    pipe.send(saver.steps())


@pytest.mark.parametrize(
    "limit,metadata",
    [(1_000, {}), (9_000, {"long": "x" * 9_000}), (200, {})],
)
def test_a_full_disk_keeps_the_last(tmp_path, limit, metadata):
    with child(_fill_the_disk, tmp_path, limit, metadata) as (_, pipe):
        told, names, steps = (pipe.recv() for _ in range(3))
    assert f"Could not save step 2 in {tmp_path}" in told
    assert "The last checkpoint there: step 1." in told
    assert names == ["step-00000001"]
    assert steps == [1, 2]
    saver, variables = opened(tmp_path)
    assert saver.restore_latest() == {"step": 2, **metadata}
    assert value_of(variables) == 2
