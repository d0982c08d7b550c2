import numpy as np
import pytest

from moe_tf.benchmarks import layer_kinds
from moe_tf.benchmarks import memory

MIB = 2**20


@pytest.fixture(scope="module")
def large_parent():
    """A process of half a gibibyte, as a benchmark's is."""
    return np.ones(2**26)


@pytest.mark.slow
def test_a_row_grows_its_own_process_whatever_this_one_holds(large_parent):
    # 16 MiB each: weights in, weights out, gradients of both.
    setting = layer_kinds.Setting(tokens=8, width=512, hidden=8192, k=1)
    got = memory.in_own_process(layer_kinds.Row("dense"), setting)
    assert large_parent.nbytes == 512 * MIB
    assert 64 * MIB <= got < 400 * MIB


@pytest.mark.slow
def test_more_experts_take_more():
    setting = layer_kinds.Setting(tokens=8, width=512, hidden=2048, k=1)
    few, many = (
        memory.in_own_process(layer_kinds.Row("grouped", number), setting)
        for number in (1, 9)
    )
    # Eight more of 8 MiB, and as much of gradients.
    assert many - few >= 100 * MIB
