"""The language model with experts, on real text: what one device gives.

With noise, dropout, balancing losses, sampled softmax and dropped words.
"""

import functools
import tempfile

import numpy as np
import pytest

from moe_tf.benchmarks import mesh_text
from moe_tf.distribute import MeshStrategy
from moe_tf.distribute import all_reduces
from tests.distribute import process

FLAT = ("MoE-8", "noisy_top_k")
TWO_LEVELS = ("MoE-8x2-h", "noisy_top_k")
BATCHWISE = ("MoE-8", "batchwise")
BATCH_4 = (("batch", 4),)
SQUARE = (("batch", 2), ("expert", 2))
MESHES = (
    *((("batch", size),) for size in (1, 2, 4, 8)),
    SQUARE,
    (("batch", 4), ("expert", 2)),
)
QUICK = {
    BATCH_4: ((*FLAT, "adam_clipped"), (*BATCHWISE, "adafactor")),
    SQUARE: ((*TWO_LEVELS, "factored_adam"),),
}
ALL = (
    *((*FLAT, name) for name in mesh_text.OPTIMIZERS),
    (*TWO_LEVELS, "adam"),
    (*BATCHWISE, "adam"),
)


def train(meshes):
    """For each mesh and setting the differences from one device."""
    # The largest first: it makes the devices.
    order = sorted(meshes, key=lambda axes: -np.prod([n for _, n in axes]))
    strategies = {axes: MeshStrategy(dict(axes)) for axes in order}
    with tempfile.TemporaryDirectory() as folder:
        prepared = mesh_text.prepare(folder)
        batches = mesh_text.read(prepared, 20)
    size, alone, found = prepared.vocabulary.size, {}, {}
    for axes, strategy in strategies.items():
        for wanted in meshes[axes]:
            setting = mesh_text.Setting(*wanted)
            if wanted not in alone:
                alone[wanted] = mesh_text.train(None, setting, batches, size)
            one = alone[wanted]
            got = mesh_text.train(strategy, setting, batches, size)
            apart = mesh_text.differences(one, got)
            found[axes, wanted] = apart, one.dropped, one.losses
    return found


def check(found):
    for key, (apart, dropped, losses) in found.items():
        assert losses[-1] < losses[0] - 0.5, key  # It learns.
        if key[1][1] != "batchwise":  # That never drops.
            assert dropped > 0.02, key
        # Of about 6; SGD with its large steps is the furthest, also on a mesh
        # of one device.
        assert apart["loss"] < 3e-5, (key, apart)
        assert apart["weights_share"] < 2e-4, (key, apart)
        assert apart["slots_share"] < 2e-4, (key, apart)


@functools.cache
def quick():
    return process.run(train, QUICK)


@pytest.mark.slow
def test_equals_one_device():
    check(quick())


@pytest.mark.slow
@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_every_optimizer_and_router_equals_one_device(axes):
    found = process.run(train, {axes: ALL}, timeout=1200)
    for key, (apart, *_) in found.items():
        print(key, apart)
    check(found)


def train_with_merged_all_reduces():
    all_reduces.prepare = lambda: None
    all_reduces.check = lambda mesh: None
    return train({SQUARE: ((*FLAT, "adam"),)})


def test_it_would_be_noticed_if_all_reduces_were_merged():
    """Without the variable that `all_reduces` sets, equality is lost."""
    name = "DTENSOR_ENABLE_COMBINE_ALL_REDUCES_OPTIMIZATION"
    found = process.run(train_with_merged_all_reduces, env={name: "1"})
    ((apart, *_),) = found.values()
    assert apart["loss"] > 1e-2
    assert apart["weights_share"] > 1e-2
    with pytest.raises(AssertionError):
        check(found)
