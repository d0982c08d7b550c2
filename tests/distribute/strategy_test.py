"""Variables on a mesh: their layout, their values, files of them."""

import copy
import functools
import tempfile
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.experimental import dtensor

from moe_tf import sharding
from moe_tf.distribute import MeshStrategy
from moe_tf.distribute import mesh_variables
from moe_tf.distribute import placement
from tests import process
from tests.distribute import equality_test
from tests.distribute import models

AXES = {"batch": 2, "expert": 2}
CUSTOM = {"EveryExpert": models.EveryExpert, "Experts": models.Experts}


def make(strategy=None, optimizer="adam", build=models.language_model):
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    scope = (strategy or tf.distribute.get_strategy()).scope()
    with scope:
        model = build()
        model.compile(
            optimizer,
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
    return model


def shards():
    """Shapes of the parts of kernels and slots; values of the parts."""
    strategy = MeshStrategy(AXES)
    model = make(strategy)
    model.train_on_batch(*(part[:4] for part in equality_test.data()))
    parts = {}
    for variable in model.variables + model.optimizer.variables:
        value = variable.value.read_value()
        parts[variable.path] = (
            [part.numpy() for part in dtensor.unpack(value)],
            variable.numpy(),
        )
    return parts


def test_devices_hold_their_shards_only():
    parts = result("shards")
    kernels = [path for path in parts if "expert_" in path]
    assert len(kernels) == 6  # Two, and two slots each.
    for path, (held, whole) in parts.items():
        if path not in kernels:
            assert all((part == whole).all() for part in held), path
            continue
        halves = [whole[:2], whole[2:]]
        assert all((held[i] == halves[i % 2]).all() for i in range(4)), path


class Lazy(keras.Model):
    """Builds its layers in `call`, so variables come after their scopes."""

    def __init__(self):
        super().__init__()
        self.embedding = keras.layers.Embedding(31, 8)
        self.moe = models.EveryExpert(name="moe")
        self.dense = keras.layers.Dense(31)

    def call(self, inputs):
        return self.dense(self.moe(self.embedding(inputs)))


def specs(layout_map, build):
    strategy = MeshStrategy(AXES, layout_map=layout_map)
    model = make(strategy, build=build)
    if model.built:  # Slots are as after a step, which takes seconds.
        with strategy.scope():
            model.optimizer.build(model.trainable_variables)
    else:
        model.train_on_batch(*(part[:4] for part in equality_test.data()))
    return {row.path: row.layout for row in strategy.summary(model)}


def test_layers_built_in_call():
    found = result("lazy")
    kernels = [spec for path, spec in found.items() if "expert_" in path]
    assert kernels == [("expert", None, None)] * 6


OWN_RULES = {
    "expert_in_kernel": (None, None, None),
    "dense.*/kernel": ("batch", None),
}


def test_the_users_rules_come_first():
    found = result("own_rules")
    sharded = {path: spec for path, spec in found.items() if any(spec)}
    assert len(sharded) == 6
    for path, spec in sharded.items():
        axis = "batch" if "dense" in path else "expert"
        assert spec[0] == axis and not any(spec[1:]), path


def refused(layout_map):
    make(MeshStrategy(AXES, layout_map=layout_map))


REFUSED = {
    "length": {"embeddings": ("expert", None)},
    "rank": {"gamma": (None, "batch")},
    "two": {"kernel": ("batch", None), "_kernel": (None, None)},
}


@pytest.mark.parametrize(
    "name,message",
    [
        ("length", "Dimension 0 of embedding/embeddings .*fit: 30 or 32"),
        ("rank", "The layout of .*gamma must have one"),
        ("two", "disagree"),
    ],
)
def test_layouts_that_do_not_suit(name, message):
    with pytest.raises(ValueError, match=message):
        raise result(name)


def made_outside():
    strategy = MeshStrategy(AXES)
    strategy.check(make())


def test_models_made_outside_are_refused():
    with pytest.raises(ValueError, match="Make and compile the model ins"):
        raise result("made_outside")


def mislaid():
    """A kernel lies whole; what the message says to do is done first."""
    strategy = MeshStrategy(AXES)
    model, other = make(strategy), make(strategy)
    kernel, new = (m.get_layer("moe").experts.in_EDF for m in (model, other))
    layout = placement.layout(strategy.mesh, (None, None, None))
    wrong = mesh_variables.MeshVariable(placement.put(kernel.numpy(), layout))
    for name in ("path", "spec", "rule"):
        setattr(wrong, name, getattr(kernel.value, name))
    kernel._value = wrong  # No assignment changes a layout.
    strategy.assign(new, strategy.fetch(kernel))
    strategy.check(other)
    strategy.check(model)


def test_what_is_laid_out_otherwise_is_named():
    with pytest.raises(ValueError) as raised:
        raise result("mislaid")
    assert str(raised.value) == (
        "The variable moe/experts/expert_in_kernel must be laid out as "
        "('expert', None, None), and variables keep the layout that they are "
        "made with. Make the model anew inside `with strategy.scope():`; "
        "`strategy.fetch` and `strategy.assign` carry values over. "
        "Received: (None, None, None)"
    )


def dense_model():
    inputs = keras.Input((8,))
    large = keras.layers.Dense(2**21 + 1, use_bias=False, name="large")
    return keras.Model(inputs, large(inputs))


def warned():
    strategy = MeshStrategy(AXES, layout_map={"kernle": (None, None)})
    model = make(strategy, "sgd", dense_model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        strategy.check(model)
    return [str(warning.message) for warning in caught]


def test_what_is_not_sharded_is_named():
    unmatched, large, idle = result("warned")
    assert "['kernle']" in unmatched
    assert "large/kernel  (8, 2097153)  float32  (-, -)  64.000 MiB" in large
    assert "['expert']" in idle


def files():
    with tempfile.TemporaryDirectory() as folder:
        return saved(folder)


def saved(folder):
    """Differences between a model on the mesh and what its files give."""
    strategy = MeshStrategy(AXES)
    model = make(strategy)
    x, y = equality_test.data()
    model.fit(x, y, batch_size=16, verbose=0)

    def weights(model):  # Keras's files leave the state of seeds out.
        return [v.numpy() for v in model.trainable_variables]

    def values(model):
        return weights(model) + [v.numpy() for v in model.optimizer.variables]

    whole = values(model)
    model.save(f"{folder}/model.keras")
    model.save_weights(f"{folder}/model.weights.h5")
    model.export(f"{folder}/served", verbose=False)
    checkpoint = tf.train.Checkpoint(model=model).save(f"{folder}/checkpoint")
    found = {}

    def compare(name, left, right):
        pairs = zip(left, right, strict=True)
        found[name] = max(np.abs(a - b).max() for a, b in pairs)

    one = keras.models.load_model(f"{folder}/model.keras", CUSTOM)
    compare("one device", values(one), whole)
    with strategy.scope():
        mesh = keras.models.load_model(f"{folder}/model.keras", CUSTOM)
    strategy.check(mesh)
    compare("mesh", values(mesh), whole)
    for scope in (None, strategy):
        other = make(scope)
        other.load_weights(f"{folder}/model.weights.h5")
        compare(f"weights {scope}", weights(other), weights(model))
        other = make(scope)
        tf.train.Checkpoint(model=other).restore(checkpoint)
        compare(f"checkpoint {scope}", weights(other), weights(model))
    served = tf.saved_model.load(f"{folder}/served")
    expected = model.predict(x[:5], verbose=0)
    compare("served", [served.serve(x[:5]).numpy()], [expected])
    return found


@pytest.mark.thorough
def test_files():
    found = process.run(files)
    assert found.pop("served") < 1e-6
    assert len(found) == 6
    assert set(found.values()) == {0}


def assigned():
    strategy = MeshStrategy(AXES)
    model = make(strategy)
    new = [np.random.random(w.shape).astype(w.dtype) for w in model.weights]
    model.set_weights(new)
    strategy.check(model)
    kernel = model.get_layer("moe").experts.in_EDF
    return new, [
        model.get_weights(),
        [v.numpy() for v in model.weights],
        [np.asarray(v) for v in model.weights],
        [np.asarray(v.value) for v in model.weights],
        [keras.ops.convert_to_numpy(v) for v in model.weights],
        copy.copy(kernel.value.spec),
    ]


def test_values_can_be_read_and_assigned():
    new, (*read, spec) = result("assigned")
    assert spec == ("expert", None, None)
    for values in read:
        for expected, actual in zip(new, values, strict=True):
            np.testing.assert_array_equal(actual, expected)


def constrained():
    strategy = MeshStrategy(AXES)

    @tf.function
    def step(x):
        y = sharding.constrain(x * 2.0, "expert", "batch")
        return y, sharding.axes()["batch"]

    y, size = strategy.run(step, args=(np.ones((4, 6), "float32"),))
    return dtensor.fetch_layout(y).sharding_specs, y.shape, size


def test_constrain():
    assert result("constrained") == (["expert", "batch"], [4, 6], 2)


def test_without_a_mesh():
    tensor = tf.ones((3,))
    assert sharding.constrain(tensor, "batch") is tensor
    assert sharding.axes() is None
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        assert sharding.axes() is None
    assert sharding.expert_axis({"batch": 2}) == "batch"
    assert sharding.expert_axis(AXES) == "expert"


def constrain_three():
    strategy = MeshStrategy(AXES)
    strategy.constrain(tf.ones((3, 2)), "batch", None)


def test_constrain_refuses_what_does_not_divide():
    with pytest.raises(ValueError, match="Dimension 0 of a tensor"):
        raise result("constrain_three")


def run_all():
    """What each of these returns or raises; no error here spoils the rest."""
    calls = {
        "shards": shards,
        "lazy": lambda: specs(None, Lazy),
        "own_rules": lambda: specs(OWN_RULES, models.language_model),
        "made_outside": made_outside,
        "mislaid": mislaid,
        "warned": warned,
        "assigned": assigned,
        "constrained": constrained,
        "constrain_three": constrain_three,
        **{
            name: functools.partial(refused, layouts)
            for name, layouts in REFUSED.items()
        },
    }
    found = {}
    for name, call in calls.items():
        try:
            found[name] = call()
        except ValueError as error:
            found[name] = error
    return found


@functools.cache
def results():
    return process.run(run_all)


def result(name):
    return results()[name]
