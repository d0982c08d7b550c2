import json
import os
import subprocess
import sys
import time

import ml_collections
import pytest

from moe_tf.training import workdir as workdirs

_HOLD = """
import sys
import ml_collections
from moe_tf.training import workdir
workdir.claim_workdir(sys.argv[1], ml_collections.ConfigDict({"seed": 0}))
print("claimed", flush=True)
sys.stdin.read()
"""


def config(**changes):
    result = ml_collections.ConfigDict(
        {"seed": 0, "moe": {"k": 2, "sizes": (3, 4)}, "train": {"steps": 100}}
    )
    result.update_from_flattened_dict(changes)
    return result


def record(path, config):
    with workdirs.claim_workdir(path, config) as claim:
        claim.record()


def test_a_run_that_did_not_begin_binds_nothing(tmp_path):
    workdirs.claim_workdir(tmp_path, config(**{"train.steps": 200})).release()
    record(tmp_path, config())
    recorded = json.loads((tmp_path / "config.json").read_text())
    assert recorded["train"]["steps"] == 100


def test_fields_that_are_free_may_differ(tmp_path):
    record(tmp_path, config())
    other = config(**{"train.steps": 200, "moe.k": 3})
    for free in (["train.steps", "moe"], ["train", "moe.k"]):
        workdirs.check_workdir(tmp_path, other, free)
        workdirs.claim_workdir(tmp_path, other, free).release()
    for free in (["train.step", "moe"], ["train"]):
        with pytest.raises(ValueError, match="another config"):
            workdirs.check_workdir(tmp_path, other, free)


def test_writes_the_config_once(tmp_path):
    path = tmp_path / "runs" / "one"
    with workdirs.claim_workdir(path, config()) as claim:
        assert not (path / "config.json").exists()
        claim.record()
        text = (path / "config.json").read_text()
    assert json.loads(text) == {
        "moe": {"k": 2, "sizes": [3, 4]},
        "seed": 0,
        "train": {"steps": 100},
    }
    assert text.index('"moe"') < text.index('"seed"') < text.index('"train"')
    before = os.stat(path / "config.json")
    with workdirs.claim_workdir(path, config()) as claim:
        claim.record()
        workdirs.check_workdir(path, config())
    assert os.stat(path / "config.json") == before
    assert sorted(os.listdir(path)) == [".lock", "config.json"]


def test_refuses_another_config_field_by_field(tmp_path):
    record(tmp_path, config())
    other = config(**{"train.steps": 200, "moe.sizes": (3, 5)})
    other.moe.gating = "softmax"
    other.extra = ml_collections.ConfigDict()
    del other.seed
    for refusing in (workdirs.claim_workdir, workdirs.check_workdir):
        with pytest.raises(ValueError) as caught:
            refusing(tmp_path, other)
        assert str(caught.value).splitlines()[1:] == [
            "  extra: missing in the workdir, {} now",
            '  moe.gating: missing in the workdir, "softmax" now',
            "  moe.sizes: [3, 4] in the workdir, [3, 5] now",
            "  seed: 0 in the workdir, missing now",
            "  train.steps: 100 in the workdir, 200 now",
            "Use another workdir, or the same config.",
        ]
    workdirs.claim_workdir(tmp_path, config()).release()  # nothing is held


def test_refuses_a_config_that_json_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match="plain data"):
        workdirs.claim_workdir(
            tmp_path / "new", ml_collections.ConfigDict({"a": int})
        )
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_names_a_damaged_config(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError, match="config.json is not the config"):
        workdirs.claim_workdir(tmp_path, config())
    assert (tmp_path / "config.json").read_bytes() == text.encode("latin1")


def test_check_writes_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="Train first"):
        workdirs.check_workdir(tmp_path / "none", config())
    assert os.listdir(tmp_path) == []


def test_refuses_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file is not a folder"):
        workdirs.claim_workdir(tmp_path / "file", config())
    with pytest.raises(OSError, match="Not a directory"):
        workdirs.claim_workdir(tmp_path / "file" / "below", config())
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs Linux")
def test_refuses_a_folder_that_cannot_be_written():
    # /proc refuses new files from every user, root included.
    with pytest.raises(OSError, match="/proc/self is not writable"):
        workdirs.claim_workdir("/proc/self", config())


def test_claims_once_in_a_process(tmp_path):
    workdirs.claim_workdir(
        tmp_path, config()
    )  # stays, though nothing refers to it
    with pytest.raises(BlockingIOError, match=f"by process {os.getpid()} on "):
        workdirs.claim_workdir(tmp_path, config())
    (tmp_path / "other").mkdir()
    with workdirs.claim_workdir(tmp_path / "other", config()) as claim:
        pass
    claim.release()
    workdirs.claim_workdir(tmp_path / "other", config()).release()


def test_another_process_must_wait_until_the_holder_is_killed(tmp_path):
    command = [sys.executable, "-c", _HOLD, tmp_path]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    mine = ml_collections.ConfigDict({"seed": 0})
    with subprocess.Popen(command, **pipes) as holder:
        try:
            assert holder.stdout.readline() == b"claimed\n"
            start = time.monotonic()
            with pytest.raises(
                BlockingIOError, match=f"process {holder.pid} on"
            ):
                workdirs.claim_workdir(tmp_path, mine)
            assert time.monotonic() - start < 1
            with pytest.raises(FileNotFoundError):  # readers need not wait
                workdirs.check_workdir(tmp_path, mine)
        finally:
            holder.kill()
    workdirs.claim_workdir(tmp_path, mine).release()


def test_a_run_from_before_fields_were_renamed_goes_on(tmp_path):
    before = {"seed": 0, "model": {"width": 8, "k": 2, "expert_hidden": None}}
    (tmp_path / "config.json").write_text(json.dumps(before))
    moe = {"k": 2, "hidden_units": None, "num_experts": None}
    now = ml_collections.ConfigDict(
        {"seed": 0, "model": {"width": 8}, "moe": moe}
    )
    workdirs.check_workdir(tmp_path, now)
    now.moe.k = 3
    with pytest.raises(ValueError, match="moe.k: 2 in the workdir, 3 now"):
        workdirs.check_workdir(tmp_path, now)
