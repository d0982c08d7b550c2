import re
import subprocess
import sys

import pytest

from moe_tf.benchmarks import largest
from tests import sets


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "flags",
    [sets.slow(("--capacity_factor=2",)), sets.slow(())],
)
def test_trains_and_tells_what_it_took(flags):
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "moe_tf.benchmarks.largest",
            *("--num_experts=8", "--width=16", "--hidden=32", "--k=2"),
            *("--tokens=64", "--steps=60"),
            *flags,
        ],
        capture_output=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr.decode()
    told = result.stdout.decode()
    assert told.startswith(f"{8 * 2 * 16 * 32:,} expert parameters, 60 steps")
    first, last = map(float, re.search(r"loss (\S+) to (\S+),", told).groups())
    assert last < first
    assert 0.1 < float(re.search(r"peak (\S+) GiB", told)[1]) < 4


@pytest.mark.parametrize("number", [2**23, 10**9, 17 * 10**9, 10**11])
def test_layers_whose_kernels_have_fewer_than_2_31_entries(number):
    layers, experts = largest.divide(number, 1024, 4096)
    assert experts * 1024 * 4096 < 2**31
    used = layers * experts * 2 * 1024 * 4096
    assert 0 <= number - used < layers * 2 * 1024 * 4096 + 2 * 1024 * 4096
