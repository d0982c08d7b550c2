import json
import os
import shutil
import subprocess

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from moe_tf.training import checkpoints
from tests import sets

_SHAPES = {"model/a.b/kernel": (64, 32), "model/a": (), "optimizer/a/m": (7,)}


def make(value=0):
    variables = {n: tf.Variable(tf.zeros(s)) for n, s in _SHAPES.items()}
    variables["model/seed"] = tf.Variable([0, 0], dtype=tf.int64)
    variables["model/half"] = tf.Variable([0.0], dtype=tf.bfloat16)
    fill(variables, value)
    return variables


def fill(variables, value):
    for variable in variables.values():
        variable.assign(tf.cast(tf.fill(variable.shape, value), variable.dtype))


def value_of(variables):
    """The one value that all entries of all variables have."""
    values = {float(x) for v in variables.values() for x in np.ravel(v)}
    assert len(values) == 1, f"a mixture of states: {values}"
    return values.pop()


def opened(directory, value=0, keep=2):
    variables = make(value)
    return checkpoints.Checkpoints(directory, variables, keep), variables


def save(directory, step, value=None, keep=2, metadata=None):
    saver, _ = opened(directory, step if value is None else value, keep)
    return saver.save(step, metadata)


def damage(path, name="variables.index"):
    with open(os.path.join(path, name), "r+b") as file:
        file.write(b"\xff" * 8)


def test_restores_values_and_metadata(tmp_path):
    path = save(tmp_path / "new" / "last", 100, 3, metadata={"best": 1.5})
    assert os.path.basename(path) == "step-00000100"
    saver, variables = opened(tmp_path / "new" / "last")
    assert saver.restore_latest() == {"step": 100, "best": 1.5}
    assert value_of(variables) == 3
    fill(variables, 0)
    assert saver.restore(path) == {"step": 100, "best": 1.5}
    assert value_of(variables) == 3


def test_nothing_there(tmp_path):
    saver, _ = opened(tmp_path / "none")
    assert saver.restore_latest() is None
    assert saver.latest_step() is None
    assert saver.steps() == []
    assert not (tmp_path / "none").exists()
    with pytest.raises(FileNotFoundError, match="no checkpoint folder"):
        saver.restore(tmp_path / "none")


@pytest.mark.parametrize("keep", [1, 3])
def test_keeps_the_newest(tmp_path, keep):
    saver, _ = opened(tmp_path, keep=keep)
    (tmp_path / "step-1").mkdir()  # not ours, stays
    (tmp_path / "step-00000001").write_text("nor this")
    for step in (8, 9, 10, 100_000_000, 100_000_001):
        saver.save(step)
    steps = [8, 9, 10, 100_000_000, 100_000_001][-keep:]
    assert saver.steps() == steps
    assert saver.latest_step() == 100_000_001
    assert len(os.listdir(tmp_path)) == keep + 2


def test_sums_are_those_of_sha256sum(tmp_path):
    path = save(tmp_path, 1)
    command = ["sha256sum", "--strict", "-c", "SHA256SUMS"]
    told = subprocess.run(command, cwd=path, capture_output=True, check=True)
    assert told.stdout.count(b": OK") == len(os.listdir(path)) - 1


def test_metadata_names_the_variables(tmp_path):
    path = save(tmp_path, 1)
    with open(os.path.join(path, "metadata.json")) as file:
        variables = json.load(file)["variables"]
    assert variables["model/a.b/kernel"] == {
        "shape": [64, 32],
        "dtype": "float32",
    }
    assert variables.keys() == make().keys()


@pytest.mark.parametrize(
    "step,metadata,error,match",
    [
        (-1, {}, ValueError, "Received: -1"),
        (1.5, {}, TypeError, "float"),
        (2, {"step": 3}, ValueError, "'step'"),
        (2, {"x": np.float32(1)}, TypeError, "float32"),
    ],
)
def test_refuses_before_writing(tmp_path, step, metadata, error, match):
    save(tmp_path, 1)
    saver, _ = opened(tmp_path)
    with pytest.raises(error, match=match):
        saver.save(step, metadata)
    assert os.listdir(tmp_path) == ["step-00000001"]


def test_refuses_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="`keep`.*Received: keep=0"):
        opened(tmp_path, keep=0)
    with pytest.raises(ValueError, match="`variables`"):
        checkpoints.Checkpoints(tmp_path, {})
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file"):
        opened(tmp_path / "file")


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two")
    save(directory, 1)
    save(directory, 2)
    return directory


_FILES = [
    "variables.index",
    "variables.data-00000-of-00001",
    "metadata.json",
    "SHA256SUMS",
]


def assert_falls_back(directory, caplog, name):
    caplog.clear()
    saver, variables = opened(directory)
    assert saver.restore_latest() == {"step": 1}
    assert value_of(variables) == 1
    assert "step-00000002" in caplog.text
    assert name in caplog.text
    with pytest.raises(checkpoints.DamagedCheckpointError, match=name):
        saver.restore(directory / "step-00000002")
    assert value_of(variables) == 1


@pytest.mark.parametrize(
    "name", sets.split(_FILES, ("metadata.json", "variables.index"))
)
def test_detects_any_flipped_bit(two_saved, tmp_path, caplog, name):
    original = (two_saved / "step-00000002" / name).read_bytes()
    directory = tmp_path / "flipped"
    shutil.copytree(two_saved, directory)

    @settings(max_examples=60, deadline=None, database=None)
    @given(st.integers(0, len(original) - 1), st.integers(0, 7))
    def check(offset, bit):
        flipped = bytearray(original)
        flipped[offset] ^= 1 << bit
        (directory / "step-00000002" / name).write_bytes(flipped)
        assert_falls_back(directory, caplog, name)

    check()


@pytest.mark.parametrize("name", _FILES)
def test_detects_truncated_and_missing_files(two_saved, tmp_path, caplog, name):
    shutil.copytree(two_saved, tmp_path / "short")
    path = tmp_path / "short" / "step-00000002" / name
    size = path.stat().st_size
    for left in (size - 1, size // 2, 0):
        os.truncate(path, left)
        assert_falls_back(tmp_path / "short", caplog, name)
    path.unlink()
    assert_falls_back(tmp_path / "short", caplog, name)


def test_all_damaged_is_an_error(tmp_path):
    damage(save(tmp_path, 1))
    damage(save(tmp_path, 2), "metadata.json")
    saver, variables = opened(tmp_path)
    with pytest.raises(checkpoints.DamagedCheckpointError) as caught:
        saver.restore_latest()
    told = str(caught.value)
    assert "step-00000001: SHA256SUMS does not fit variables" in told
    assert "step-00000002: SHA256SUMS does not fit metadata" in told
    assert f"move {tmp_path} away" in told
    assert value_of(variables) == 0


def test_a_damaged_one_is_never_preferred_later(tmp_path, caplog):
    save(tmp_path, 1)
    damage(save(tmp_path, 9))
    saver, variables = opened(tmp_path, keep=1)
    assert saver.restore_latest() == {"step": 1}
    saver.save(5)
    assert saver.steps() == [5]
    assert "went on" not in caplog.text  # nothing good was removed
    assert opened(tmp_path)[0].restore_latest() == {"step": 5}


def test_a_damaged_one_does_not_count_as_kept(tmp_path):
    save(tmp_path, 1, keep=3)
    damage(save(tmp_path, 2, keep=3))
    saver, _ = opened(tmp_path, keep=2)
    saver.restore_latest()
    saver.save(3)
    assert saver.steps() == [1, 3]


def test_a_damaged_one_is_replaced_at_its_step(tmp_path):
    save(tmp_path, 1)
    damage(save(tmp_path, 2))
    saver, variables = opened(tmp_path)
    saver.restore_latest()
    fill(variables, 22)
    saver.save(2)
    assert sorted(os.listdir(tmp_path)) == ["step-00000001", "step-00000002"]
    fill(variables, 0)
    assert saver.restore_latest() == {"step": 2}
    assert value_of(variables) == 22


def test_going_on_from_an_earlier_one_drops_the_later(tmp_path, caplog):
    path = save(tmp_path, 1)
    save(tmp_path, 9)
    saver, _ = opened(tmp_path)
    saver.restore(path)
    saver.save(2)
    assert saver.steps() == [1, 2]
    assert "steps [9]" in caplog.text


def test_another_model_is_not_damage(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    variables = make()
    del variables["model/seed"]
    variables["model/a"] = tf.Variable([0.0])
    variables["model/half"] = tf.Variable([0.0])
    for i in range(12):
        variables[f"new/{i:02d}"] = tf.Variable(0.0)
    with pytest.raises(ValueError) as caught:
        checkpoints.Checkpoints(tmp_path, variables).restore_latest()
    told = str(caught.value)
    assert "only in the checkpoint: model/seed\n" in told
    assert "only in the model: new/00, new/01" in told
    assert "new/09, ... (12 in all)\n" in told
    assert "model/a (float32 [] saved, float32 [1] wanted)" in told
    assert "model/half (bfloat16 [1] saved, float32 [1] wanted)" in told
    assert value_of(variables) == 0
