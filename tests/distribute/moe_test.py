"""`SparseMoE` on a mesh: what one device gives, and two all-to-alls a pass."""

import contextlib
import functools
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.experimental import dtensor

import moe_tf
from moe_tf.dispatch import capacity
from moe_tf.distribute import collectives
from tests import process
from tests import sets
from tests.distribute import models

BATCH_4 = (("batch", 4),)
TWO_AXES = (("batch", 2), ("expert", 2))
CASES = {
    "all_at_once": {
        "branching": (4, 2),
        "k": 2,
        "capacity_factor": 0.75,
        "drop_policy": "gate_value",
        "recompute": True,
    },
    "two_levels": {"branching": (4, 2), "k": 2, "capacity_factor": 1.0},
    "batchwise": {"gating": "batchwise", "k": 2},
    "two_levels_batchwise": {
        "gating": "batchwise",
        "branching": (4, 2),
        "k": 1,
    },
    "by_value": {
        "k": 2,
        "capacity_factor": 0.75,
        "drop_policy": "gate_value",
        "recompute": True,
    },
    "dropless": {"k": 2},
    "expert_choice": {"gating": "expert_choice", "k": 2},
    "switch": {"gating": "switch", "capacity_factor": 1.0},
    "softmax": {"gating": "softmax_top_k", "k": 2, "z_loss_weight": 0.1},
}
QUICK = ("all_at_once",)
APART = ("two_levels", "by_value")


def train(axes, names):
    """Logs and variables of small models after training, by name.

    The last batch has 11 examples of 6 tokens, which neither 4 nor 8
    divides. In `QUICK` all have, so that one program does for all.
    """
    strategy = moe_tf.MeshStrategy(dict(axes)) if axes else None
    rng = np.random.default_rng(0)
    size, rows = (11, 44) if names == QUICK else (16, 59)
    ids_BL = rng.integers(0, 31, (rows, 6)).astype("int32")
    target_BL = (ids_BL + 1) % 31
    data = tf.data.Dataset.from_tensor_slices((ids_BL, target_BL)).batch(size)
    if strategy:
        data = strategy.shard_batches(data)
    found = {}
    for name in names:
        keras.utils.set_random_seed(1)
        with strategy.scope() if strategy else contextlib.nullcontext():
            model = model_of(CASES[name])
        logs = model.fit(data, epochs=3, verbose=0).history
        tested = model.evaluate(data, verbose=0, return_dict=True)
        logs.update({f"test_{key}": value for key, value in tested.items()})
        logs["predicted"] = model.predict(ids_BL[:5], verbose=0)
        variables = model.variables + model.optimizer.variables
        found[name] = logs, [np.array(v.numpy()) for v in variables]
    return found


def model_of(settings):
    inputs = keras.Input((6,), dtype="int32")
    x = keras.layers.Embedding(31, 8, mask_zero=True)(inputs)
    x = moe_tf.SparseMoE(8, 12, num_groups=8, seed=3, name="moe", **settings)(x)
    x = keras.layers.Dropout(0.1, seed=4)(x)
    model = keras.Model(inputs, keras.layers.Dense(31)(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-2), loss, jit_compile=False)
    return models.build_slots(model)


@functools.cache
def alone(names):
    return process.run(train, None, names)


def compare(meshes, names):
    wanted = alone(names)
    assert wanted[names[0]][0]["moe_dropped_fraction"][0] > 0.05
    for axes in meshes:
        same(wanted, process.run(train, axes, names))


def same(wanted, found):
    # 2.6e-7 is the largest difference seen in a weight.
    for name, (want, want_variables) in wanted.items():
        got, variables = found[name]
        assert want.keys() == got.keys()
        for key in want:
            np.testing.assert_allclose(
                got[key], want[key], rtol=5e-6, atol=5e-6, err_msg=name
            )
        for one, other in zip(want_variables, variables, strict=True):
            # Some slots are tiny.
            limit = 2e-5 * np.abs(one).max()
            np.testing.assert_allclose(other, one, 0, limit, err_msg=name)


@pytest.mark.parametrize("names", [QUICK, sets.slow(APART)], ids=str)
def test_training_equals_one_device(names):
    compare([TWO_AXES], names)


@pytest.mark.slow
def test_two_processes_equal_one_device():
    wanted = alone(QUICK)
    cluster = process.start_cluster(train, BATCH_4, QUICK)
    try:
        for member in cluster:
            same(wanted, member.result())
    finally:
        for member in cluster:
            member.close()


@pytest.mark.slow
def test_training_equals_one_device_for_every_router_on_every_mesh():
    meshes = [
        (("batch", 1),),
        (("batch", 2),),
        BATCH_4,
        TWO_AXES,
        (("batch", 8),),
        (("batch", 4), ("expert", 2)),
    ]
    compare(meshes, tuple(CASES))


def exchanged(axes, names):
    """Collectives of a step by name and by number of tokens a row."""
    strategy = moe_tf.MeshStrategy(dict(axes))
    found = {}
    for name in names:
        for length in (5, 20):
            with strategy.scope():
                model = keras.Sequential([keras.Input((length, 8))])
                model.add(keras.layers.Dense(8))
                layer = moe_tf.SparseMoE(8, 12, num_groups=4, **CASES[name])
                model.add(layer)
                model.compile("sgd", "mse", jit_compile=False)
                models.build_slots(model)
            x_BLD = np.random.default_rng(0).normal(size=(8, length, 8))
            found[name, length] = collectives.list_collectives(
                model.train_on_batch, x_BLD.astype("float32"), x_BLD
            )
    return found


def slots_of(settings, num_tokens):
    """`G * E * C`, all slots of a batch."""
    k = 4 if "branching" in settings else settings.get("k", 1)
    factor = settings.get("capacity_factor", 1.0)
    return 4 * 8 * capacity.expert_capacity(num_tokens // 4 * k, 8, factor)


@pytest.mark.parametrize(
    "names",
    [QUICK, *map(sets.slow, (APART, ("batchwise", "switch")))],
    ids=str,
)
def test_a_layer_costs_two_all_to_alls_forward_and_two_backward(names):
    found = process.run(exchanged, BATCH_4, names)
    for name in names:
        settings, reduced = CASES[name], []
        for length in (5, 20):
            ops = found[name, length]
            moved = [op for op in ops if op.kind == "all-to-all"]
            # The recomputation sends the tokens once more.
            assert len(moved) == 4 + settings.get("recompute", False), name
            # A device's share of the slots, of float32 of width 8.
            share = slots_of(settings, 8 * length) * 8 * 4 // 4
            assert {op.bytes for op in moved} == {share}
            others = [op for op in ops if op.kind != "all-to-all"]
            assert {op.kind for op in others} == {"all-reduce"}
            reduced.append(sorted(op.bytes for op in others))
        assert reduced[0] == reduced[1], "something else grows with tokens"
        # No gradient of an expert's kernel is reduced: it has one owner.
        assert max(reduced[0]) < 8 * 8 * 12 * 4 / 4


@pytest.mark.thorough
def test_with_an_expert_axis_tokens_are_gathered_over_it_alone():
    found = process.run(exchanged, TWO_AXES, ("switch",))
    for length in (5, 20):
        ops = found["switch", length]
        assert {op.kind for op in ops} == {"all-gather", "all-reduce"}
        gathered = [op for op in ops if op.kind == "all-gather"]
        share = slots_of(CASES["switch"], 8 * length) * 8 * 4 // 2
        assert {op.bytes for op in gathered} == {share}
        assert len(gathered) == 2  # the answers, the tokens' gradients


def experts_of_devices(axes, branchings):
    """By branching: ids of the experts of each device, and warnings."""
    strategy = moe_tf.MeshStrategy(dict(axes))
    found = {}
    for branching in branchings:
        with strategy.scope():
            model = keras.Sequential([keras.Input((3, 8))])
            layer = moe_tf.SparseMoE(
                8, 12, k=1, num_groups=4, branching=branching
            )
            model.add(layer)
            model.compile("sgd", "mse", jit_compile=False)
        kernel = layer.experts.in_EDF
        ids_E = np.arange(8, dtype="float32")[:, None, None]
        strategy.assign(kernel, np.broadcast_to(ids_E, kernel.shape))
        parts = dtensor.unpack(kernel.value.read_value())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.predict(np.ones((8, 3, 8)), verbose=0)
        told = [str(w.message) for w in caught]
        told = [text for text in told if "spread over devices" in text]
        found[branching] = [part.numpy()[:, 0, 0] for part in parts], told
    return found


@pytest.mark.thorough
@pytest.mark.parametrize("axes", [BATCH_4, TWO_AXES], ids=str)
def test_the_experts_of_a_group_lie_on_one_device(axes):
    found = process.run(experts_of_devices, axes, ((4, 2), (2, 4), (1, 8)))
    size = axes[-1][1]
    for branching, (parts, told) in found.items():
        places = [set() for _ in range(branching[0])]
        for part in parts:
            for expert in part:
                places[int(expert) // branching[1]].add(tuple(part))
        whole = all(len(holders) == 1 for holders in places)
        assert whole == (branching[0] >= size), branching
        assert bool(told) == (not whole), told
        for text in told:
            assert f"branching={branching}" in text


def refused():
    strategy = moe_tf.MeshStrategy({"batch": 2})
    messages = []
    for settings in (
        {"capacity_factor": 1.0},
        {"gating": "expert_choice"},
        {"num_groups": 3},
    ):
        with strategy.scope():
            model = keras.Sequential([keras.Input((3, 8))])
            model.add(moe_tf.SparseMoE(8, 12, k=2, name="moe", **settings))
            model.compile("sgd", "mse", jit_compile=False)
        try:
            model.train_on_batch(np.ones((2, 3, 8)), np.ones((2, 3, 8)))
            messages.append("none")
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_groups_that_cannot_be_are_refused_by_name():
    needs, chooses, multiple = process.run(refused)
    for message in (needs, chooses):
        assert "layer moe needs `num_groups`" in message
        assert "num_groups=2, say" in message
    assert "multiple of the mesh's axis batch" in multiple
    assert "num_groups=3" in multiple
