"""Training on a mesh equals training on one device, for every optimizer."""

import contextlib
import functools
import os
import typing

import keras
import numpy as np
import pytest
import tensorflow as tf

import moe_tf
from moe_tf.distribute import MeshStrategy
from moe_tf.distribute import all_reduces
from tests import process
from tests.distribute import models

STEPS = 20
BATCH = 16
OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.5),
    "momentum": lambda: keras.optimizers.SGD(0.1, 0.9, nesterov=True),
    "adam": lambda: keras.optimizers.Adam(0.01),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    "adafactor": lambda: keras.optimizers.Adafactor(0.05),
    "factored_adam": lambda: moe_tf.optimizers.FactoredAdam(0.01),
    "factored_adam_beta_1": lambda: moe_tf.optimizers.FactoredAdam(
        0.01, beta_1=0.9
    ),
    "rmsprop": lambda: keras.optimizers.RMSprop(0.01),
    "adagrad": lambda: keras.optimizers.Adagrad(0.1),
    "clipnorm": lambda: keras.optimizers.SGD(0.5, clipnorm=0.05),
    "global_clipnorm": lambda: keras.optimizers.Adam(0.01, global_clipnorm=0.1),
    "clipvalue": lambda: keras.optimizers.SGD(0.5, clipvalue=0.001),
    "ema": lambda: keras.optimizers.Adam(
        0.01, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=3
    ),
    "accumulation": lambda: keras.optimizers.Adam(
        0.01, gradient_accumulation_steps=2
    ),
    "loss_scale": lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Adam(0.01), dynamic_growth_steps=3
    ),
}


# Those that are much like another wait for the slow test.
SIMILAR = (
    *("adamw", "adagrad", "clipnorm", "clipvalue", "global_clipnorm"),
    *("factored_adam_beta_1", "rmsprop", "sgd"),
)
MAIN = tuple(name for name in OPTIMIZERS if name not in SIMILAR)
TWO_AXES = (("batch", 2), ("expert", 2))
QUICK = ("adam", "factored_adam")
OTHERS = {
    TWO_AXES: tuple(name for name in MAIN if name not in QUICK),
    (("batch", 4),): ("adam",),
}
# With 16 bits sums in another order differ by that much.
DTYPES = {"float64": 5e-7, "mixed_float16": 2e-2, "mixed_bfloat16": 5e-2}


class Run(typing.NamedTuple):
    """Losses after each step, and the last values by path."""

    losses: np.ndarray
    values: list


def data():
    x = np.random.default_rng(0).integers(0, 31, (4 * BATCH, 6), "int32")
    return x, (x + 1) % 31


def train(name, scope=None, policy="float32", experts=4):
    keras.utils.set_random_seed(0)
    keras.backend.clear_session()
    keras.config.set_dtype_policy(policy)
    with scope or contextlib.nullcontext():
        model = models.language_model(experts=experts)
        model.compile(
            OPTIMIZERS[name](),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        models.build_slots(model)
    losses = []
    x, y = data()
    for step in range(STEPS):
        rows = slice(step % 4 * BATCH, (step % 4 + 1) * BATCH)
        losses.append(model.train_on_batch(x[rows], y[rows]))
    variables = model.variables + model.optimizer.variables
    return Run(np.array(losses), [(v.path, v.numpy()) for v in variables])


def train_on(meshes, policies, experts=4):
    """Runs by `(axes, optimizer, policy)`, axes None for one device."""
    strategies = {axes: MeshStrategy(dict(axes)) for axes in meshes}
    wanted = [
        (axes, name, "float32") for axes in meshes for name in meshes[axes]
    ]
    wanted += [(TWO_AXES, "sgd", policy) for policy in policies]
    found = {}
    for axes, name, policy in wanted:
        if (None, name, policy) not in found:
            found[None, name, policy] = train(name, None, policy, experts)
        scope = strategies[axes].scope()
        found[axes, name, policy] = train(name, scope, policy, experts)
    return found


@functools.cache
def other_runs():
    return process.run(train_on, OTHERS, tuple(DTYPES), timeout=900)


def differences(one, mesh):
    """The largest of losses and metrics, and of each variable."""
    values = zip(one.values, mesh.values, strict=True)
    return np.abs(one.losses - mesh.losses).max(), {
        path: np.abs(a.astype(float) - b.astype(float)).max()
        for (path, a), (_, b) in values
    }


def check_equal(found, axes, names):
    for name in names:
        one, mesh = (found[key, name, "float32"] for key in (None, axes))
        assert np.ptp(one.losses[:, 0]) > 0.01  # It learns.
        loss, variables = differences(one, mesh)
        assert loss < 5e-6, name
        assert max(variables.values()) < 5e-6, (name, variables)


def test_equals_one_device():
    found = process.run(train_on, {TWO_AXES: QUICK}, ())
    check_equal(found, TWO_AXES, QUICK)


@pytest.mark.thorough
@pytest.mark.parametrize("axes", OTHERS, ids=str)
def test_other_optimizers_and_meshes_equal_one_device(axes):
    check_equal(other_runs(), axes, OTHERS[axes])


@pytest.mark.slow
@pytest.mark.parametrize(
    "axes",
    [(("batch", size),) for size in (1, 2, 4, 8)]
    + [TWO_AXES, (("batch", 4), ("expert", 2))],
    ids=str,
)
def test_every_optimizer_equals_one_device(axes):
    """About 40 seconds for each mesh."""
    experts = max(4, dict(axes)["batch"])  # As many or more than devices.
    found = process.run(train_on, {axes: tuple(OPTIMIZERS)}, (), experts)
    check_equal(found, axes, OPTIMIZERS)


SLOTS = {
    "momentum": {"momentum": 3},
    "adafactor": {"kernel": 2, "velocity": 3},
    "factored_adam": {"velocity_row": 2, "velocity_column": 2},
    "ema": {"average": 3, "momentum": 3, "velocity": 3},
    "accumulation": {"gradient_accumulator": 3},
}


def list_specs():
    """By optimizer, layouts of a model's variables and slots by path."""
    strategy, found = MeshStrategy(dict(TWO_AXES)), {}
    for name in SLOTS:
        keras.backend.clear_session()
        with strategy.scope():
            model = models.language_model()
            optimizer = OPTIMIZERS[name]()
            optimizer.build(model.trainable_variables)
        variables = model.variables + optimizer.variables
        found[name] = {
            v.path: getattr(v.value, "spec", None) for v in variables
        }
    return found


@functools.cache
def specs_by_optimizer():
    return process.run(list_specs)


@pytest.mark.parametrize("name,slots", SLOTS.items())
def test_slots_have_the_layout_of_their_weight(name, slots):
    specs = specs_by_optimizer()[name]
    kernels = {path: spec for path, spec in specs.items() if "expert_" in path}
    for suffix, rank in slots.items():
        found = [s for path, s in kernels.items() if path.endswith(suffix)]
        expected = ("expert", *(None,) * (rank - 1))
        assert found.count(expected) >= 2, kernels
    assert set(kernels.values()) <= {("expert", None), ("expert", None, None)}
    others = [spec for path, spec in specs.items() if "expert_" not in path]
    assert not any(any(spec) for spec in others)


@pytest.mark.thorough
@pytest.mark.parametrize("policy", DTYPES)
def test_other_dtypes(policy):
    pair = (other_runs()[axes, "sgd", policy] for axes in (None, TWO_AXES))
    one, mesh = (run._replace(losses=run.losses[:, 0]) for run in pair)
    loss, variables = differences(one, mesh)
    assert loss < DTYPES[policy]
    assert max(variables.values()) < DTYPES[policy], variables


MERGE = "DTENSOR_ENABLE_COMBINE_ALL_REDUCES_OPTIMIZATION"


def train_with_merged_all_reduces():
    all_reduces.configure_environment = lambda: None
    all_reduces.check_not_merged = lambda mesh: None
    return list(train_on({TWO_AXES: ("adam",)}, ()).values())


@pytest.mark.slow
def test_merged_all_reduces_break_equality():
    """The reason for `all_reduces`: without it Adam is wrong, unnoticed."""
    pair = process.run(train_with_merged_all_reduces, env={MERGE: "1"})
    loss, variables = differences(*pair)
    assert loss > 1e-2
    assert max(variables.values()) > 1e-2


def test_the_environment_may_not_merge(monkeypatch):
    monkeypatch.setenv(MERGE, "1")
    with pytest.raises(RuntimeError, match=f"{MERGE}=1: with it"):
        MeshStrategy({"batch": 2})


def use_dtensor_before():
    all_reduces.configure_environment = lambda: None
    first = MeshStrategy({"batch": 1, "expert": 1}, devices=["CPU:3"])
    os.environ.pop(MERGE, None)
    first.run(tf.function(lambda x: x + 1.0), args=(np.ones(2),))
    os.environ[MERGE] = "0"  # Too late: DTensor has asked.
    for axes in ({"batch": 4}, {"batch": 1, "expert": 2}):
        with pytest.raises(RuntimeError, match="ran before the strategy was m"):
            MeshStrategy(axes)


def test_a_program_before_the_strategy_is_noticed():
    process.run(use_dtensor_before)
