"""What the kernels of experts take on a mesh while they are made."""

import sys

import pytest

import moe_tf
from moe_tf.benchmarks import memory
from tests.distribute import process

WIDTH, HIDDEN, EXPERTS = 1024, 2048, 16
KERNEL = 4 * EXPERTS * WIDTH * HIDDEN  # 128 MiB


def grown():
    """Bytes by which the process grows, and those that devices hold."""
    strategy = moe_tf.MeshStrategy({"batch": 4})

    def make(num_experts, hidden, width):
        with strategy.scope():
            layer = moe_tf.SparseMoE(num_experts, hidden, 2, num_groups=4)
            layer.build((None, width))
        return layer

    make(4, 8, 8)
    before = memory.high_water()
    layer = make(EXPERTS, HIDDEN, WIDTH)
    took = memory.high_water() - before
    held = [row.bytes_per_device for row in strategy.summary(layer)]
    return took, sum(held)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_device_has_a_whole_kernel():
    took, held = process.run(grown)
    # A quarter of two kernels each, and the gate.
    assert 0 < held - 2 * KERNEL / 4 < 2**20
    # Their shards, and one kernel on the host as it is drawn and cut. Whole
    # on each of four virtual devices the two alone would take 8.
    assert 2 < took / KERNEL < 5
