import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_measures_on_virtual_devices(tmp_path):
    result = subprocess.run(
        [
            *(sys.executable, "-m", "moe_tf.benchmarks.many_devices"),
            *(
                "--parts=layer,weak,dense,largest",
                "--devices=2",
                "--device_type=CPU",
            ),
            f"--out={tmp_path}",
        ],
        cwd=ROOT,
        capture_output=True,
        timeout=300,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    layer, exchanged, large = found["layer"]
    # ceil(1.25 * 2 * 64 / 8) slots of 8 experts, bfloat16 of width 16.
    size = 4 * 8 * 20 * 16 * 2 / 2**20
    assert layer["all-to-all"] == f"4, {size:.3f} MiB"
    assert layer["experts"] == 8 and layer["tokens"] == 128
    assert exchanged["fraction of the step"] > 0 and large["GB/s a device"] > 0
    # 2 x 4 experts, two groups of 96 words: ceil(1.25 * 4 * 96 / 8) slots.
    model, exchanged = found["weak"]
    size = 4 * 8 * 60 * 16 * 2 / 2**20
    assert model["all-to-all"] == f"4, {size:.3f} MiB"
    assert model["words"] == 192 and model["ms"] > 0
    (dense,) = found["dense"]
    assert dense["variant"] == "4xLSTM-512" and dense["words"] == 192
    assert "all-to-all" not in dense
    assert found["largest"] == []
    assert (tmp_path / "results.md").read_text() in result.stdout
