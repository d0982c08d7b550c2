import pathlib
import re
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).parents[2]
LINE = (
    r"(\d+) devices: [\d.]+ ms a step; (\d+) all-reduce of ([\d,]+) bytes; "
    r"(\d+) all-to-all of ([\d,]+) bytes"
)


@pytest.mark.slow
def test_a_device_sends_the_same_however_many_there_are():
    settings = ["--tokens=16", "--experts=2", "--width=8", "--hidden=4"]
    result = subprocess.run(
        [
            *(sys.executable, "-m", "moe_tf.benchmarks.scaling"),
            *("--devices=2,4", "--k=2", *settings),
        ],
        cwd=REPOSITORY,
        capture_output=True,
        timeout=300,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    first, *lines = result.stdout.splitlines()
    assert first == "a device: 16 tokens, 2 experts of 8-4-8, k 2"
    two, four = (
        [int(number.replace(",", "")) for number in found.groups()]
        for found in (re.fullmatch(LINE, line) for line in lines)
    )
    # Two devices: 4 experts, ceil(1.25 * 2 * 16 / 4) slots of each group,
    # float32 of width 8, two there and two back.
    assert two[0] == 2 and two[3:] == [4, 4 * 4 * 10 * 8 * 4]
    assert four[0] == 4 and four[3:] == two[3:]
    # The all-reduces are of dense weights; the gate has two columns an expert
    # more: its kernels, and a few vectors of the balance.
    assert four[1] == two[1]
    assert 0 < four[2] - two[2] < 4 * 4 * 4 * 8
