"""Every way into Keras's trainer gives what it gives on one device."""

import contextlib
import functools
import gc
import warnings
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.experimental import dtensor
from tensorflow.python.eager import context

from moe_tf.distribute import MeshStrategy
from moe_tf.distribute import datasets
from moe_tf.distribute import placement
from tests import process
from tests import sets
from tests.distribute import models

AXES = {"batch": 2, "expert": 2}
ROWS = 43  # Batches of 16, 16 and 11: two devices cannot share the last.
RNG = np.random.default_rng(1)
X = RNG.integers(0, 31, (ROWS, 6), "int32")
Y = (X[:, 0] + 1) % 31
WEIGHTS = RNG.random(ROWS).astype("float32")
OFTEN = {label: label / 10 for label in range(31)}


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        rows = slice(index * 16, (index + 1) * 16)
        return X[rows], Y[rows]


def endless():
    batches = Batches()
    while True:
        yield from (batches[index] for index in range(3))


def dataset():
    return tf.data.Dataset.from_tensor_slices((X, Y)).batch(16)


def fit(*data, **kwargs):
    """A function of a model; data and options may be functions, too.

    Nothing may start TensorFlow before there is a mesh.
    """

    def run(model):
        options = {key: made(value) for key, value in kwargs.items()}
        options = {"epochs": 2, "verbose": 0, **options}
        return model.fit(*map(made, data), **options).history

    return run


def evaluate(*data, **kwargs):
    return lambda model: model.evaluate(
        *map(made, data), verbose=0, return_dict=True, **kwargs
    )


def made(value):
    return value() if callable(value) else value


def on_batch(model):
    return {
        "train": model.train_on_batch(X[:5], Y[:5]),
        "weighted": model.train_on_batch(X[:4], Y[:4], WEIGHTS[:4]),
        "test": model.test_on_batch(X[:5], Y[:5]),
        "predict": model.predict_on_batch(X[:5]),
    }


def predict(model):
    return {
        "dataset": model.predict(dataset(), verbose=0),
        "array": model.predict(X, batch_size=8, verbose=0),
    }


def callbacks():
    stop = keras.callbacks.EarlyStopping(
        "loss", patience=9, restore_best_weights=True
    )
    reduce = keras.callbacks.ReduceLROnPlateau(
        "loss", patience=0, min_delta=10.0
    )
    schedule = keras.callbacks.LearningRateScheduler(lambda epoch, lr: lr * 0.9)
    return [stop, reduce, schedule, keras.callbacks.TerminateOnNaN()]


WAYS = {
    "arrays": fit(X, Y, batch_size=16),
    "sample_weight": fit(X, Y, batch_size=16, sample_weight=WEIGHTS),
    "class_weight": fit(dataset, class_weight=OFTEN),
    "validation_split": fit(X, Y, batch_size=16, validation_split=0.3),
    "validation_data": fit(dataset, validation_data=(X, Y)),
    "steps": fit(
        lambda: dataset().repeat(),
        steps_per_epoch=2,
        epochs=3,
        validation_data=dataset,
        validation_steps=2,
    ),
    "py_dataset": fit(Batches, shuffle=False),
    "workers": fit(lambda: Batches(workers=2), shuffle=False),
    "generator": fit(endless, steps_per_epoch=4),
    "callbacks": fit(dataset, callbacks=callbacks),
    "evaluate": evaluate(dataset),
    "evaluate_weighted": evaluate(X, Y, batch_size=16, sample_weight=WEIGHTS),
    "on_batch": on_batch,
    "predict": predict,
}


# Eager steps take seconds each.
EAGER = {"eager": fit(X[:5], Y[:5], epochs=1)}
OPTIONS = {
    "several_steps": {"steps_per_execution": 2},
    "xla": {"jit_compile": True},
}


def classifier():
    inputs = keras.Input((6,), dtype="int32")
    x = keras.layers.Embedding(31, 8)(inputs)
    x = models.EveryExpert(name="moe")(x)
    x = keras.layers.Dropout(0.2, seed=3)(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, keras.layers.Dense(31)(x))


def make(scope=None, **kwargs):
    keras.utils.set_random_seed(0)
    keras.backend.clear_session()
    with scope or contextlib.nullcontext():
        model = classifier()
        model.compile(
            keras.optimizers.Adam(0.01),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
            **kwargs,
        )
        model.optimizer.build(model.trainable_variables)
    return model


def run(ways, scope=None, **kwargs):
    """Results and weights by way, each from the same start."""
    model = make(scope, **kwargs)
    variables = model.variables + model.optimizer.variables
    start = [variable.numpy() for variable in variables]
    found = {}
    for name, way in ways.items():
        keras.utils.set_random_seed(0)
        for variable, value in zip(variables, start, strict=True):
            variable.assign(value)
        found[name] = way(model), model.get_weights()
    return found


# Those that are much like another wait for the slow test.
SIMILAR = (
    *("class_weight", "evaluate_weighted", "sample_weight", "workers"),
    *("validation_data", "xla"),
)


def unknown():
    return dataset().filter(lambda x, y: True)


def run_similar():
    ways = {name: WAYS[name] for name in SIMILAR if name in WAYS}
    strategy, plain = MeshStrategy(AXES), {"xla": fit(dataset)}
    one, mesh = run(ways | plain), run(ways, strategy.scope())
    return one, mesh | run(plain, strategy.scope(), **OPTIONS["xla"])


QUICK = ("arrays", "predict")


def run_quick():
    ways = {name: WAYS[name] for name in QUICK}
    strategy = MeshStrategy(AXES)
    return run(ways), run(ways, strategy.scope())


def run_others():
    ways = {
        name: way for name, way in WAYS.items() if name not in SIMILAR + QUICK
    }
    strategy = MeshStrategy(AXES)
    scope, plain = strategy.scope(), {"plain": fit(dataset)}
    one = run(ways | plain | EAGER)
    mesh = run(ways, scope)
    mesh |= run(EAGER, strategy.scope(), run_eagerly=True)
    for name, options in OPTIONS.items():
        if name in SIMILAR:
            continue
        mesh[name] = run(plain, strategy.scope(), **options)["plain"]
        one[name] = one["plain"]
    # On one device Keras's last, empty step of data of unknown length counts
    # as a step of the optimizer and of seeds; hence the other data there.
    one |= run({"unknown": fit(dataset, epochs=3)})
    mesh |= run({"unknown": fit(unknown, epochs=3)}, strategy.scope())
    return one, mesh


results = functools.cache(process.run)


@pytest.mark.parametrize(
    "name",
    [
        name
        if name in QUICK
        else sets.slow(name)
        if name in SIMILAR
        else sets.thorough(name)
        for name in (*WAYS, *EAGER, *OPTIONS, "unknown")
    ],
)
def test_equals_one_device(name):
    run_both = run_others
    if name in QUICK + SIMILAR:
        run_both = run_quick if name in QUICK else run_similar
    one, mesh = (run[name] for run in results(run_both))
    for key, value in one[0].items():
        np.testing.assert_allclose(
            mesh[0][key], value, rtol=2e-6, atol=1e-6, err_msg=key
        )
    for expected, actual in zip(one[1], mesh[1], strict=True):
        np.testing.assert_allclose(actual, expected, atol=2e-6)


class OutOfRange(keras.Model):
    """Fails with the error that Keras takes for the end of the data."""

    def train_step(self, data):
        raise tf.errors.OutOfRangeError(None, None, "from a step")


def broken_data():
    yield X[:16], Y[:16]
    raise ValueError("a bad line")


def fail(kind, strategy):
    with strategy.scope():
        model = classifier()
        if kind == "step":
            model = OutOfRange(model.inputs, model.outputs)
        model.compile("sgd", "sparse_categorical_crossentropy")
    data = dataset()
    if kind == "data":
        data = tf.data.Dataset.from_generator(
            broken_data,
            output_signature=(
                tf.TensorSpec((None, 6), "int32"),
                tf.TensorSpec((None,), "int32"),
            ),
        )
    if kind == "ragged":
        ragged = tf.ragged.constant([[1, 2], [3]])
        data = tf.data.Dataset.from_tensors((ragged, tf.constant([1, 2])))
    model.fit(data, verbose=0)


def failures():
    strategy, found = MeshStrategy(AXES), {}
    for kind in ("ragged", "step", "data"):
        try:
            fail(kind, strategy)
        except (ValueError, RuntimeError, tf.errors.OpError) as error:
            found[kind] = f"{type(error).__name__} {error}"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(dataset)(make(MeshStrategy(AXES).scope()))
    found["warnings"] = [str(warning.message) for warning in caught]
    return found


@pytest.mark.thorough
def test_errors_are_not_the_end_of_the_data():
    found = process.run(failures)
    assert "A step failed; this is not the end of the data" in found["step"]
    assert "ValueError: a bad line" in found["data"]
    assert "Batches on a mesh must be dense" in found["ragged"]
    told = [warning for warning in found["warnings"] if "whole" in warning]
    assert len(told) == 1
    assert "11 examples" in told[0]


def looked_ahead():
    strategy, drawn = MeshStrategy({"batch": 2}), []

    def generate():
        for number in range(3):
            drawn.append(number)
            yield tf.fill(4, number)
        raise tf.errors.InvalidArgumentError(None, None, "a bad line")

    iterator = datasets.MeshIterator(generate(), strategy, whole=False)
    iterator.look_ahead()
    iterator.look_ahead()
    found = {"drawn": list(drawn)}
    found["values"] = [placement.get(next(iterator))[0] for _ in range(3)]
    iterator.look_ahead()  # The error waits for who asks.
    try:
        next(iterator)
    except tf.errors.InvalidArgumentError as error:
        found["error"] = str(error)
    return found


def placed_before_waiting():
    """Batches placed when each step is waited for; iterators that are left."""
    strategy = MeshStrategy({"batch": 2})
    with strategy.scope():
        model = classifier()
        model.compile("sgd", "sparse_categorical_crossentropy")
    put_batch, wait = strategy.put_batch, context.async_wait
    look_ahead = datasets.MeshIterator.look_ahead
    placed, found, iterators = [], [], weakref.WeakSet()

    def put_and_count(batch, *args):
        if not dtensor.is_dtensor(tf.nest.flatten(batch)[0]):
            placed.append(batch)
        return put_batch(batch, *args)

    def wait_and_tell():
        found.append(len(placed))
        wait()

    def look_and_keep(self):
        iterators.add(self)
        look_ahead(self)

    strategy.put_batch, context.async_wait = put_and_count, wait_and_tell
    datasets.MeshIterator.look_ahead = look_and_keep
    gc.collect()
    gc.disable()
    model.fit(dataset(), verbose=0)
    return found, len(iterators)


@pytest.mark.thorough
def test_the_next_batch_is_placed_while_devices_work():
    found = process.run(looked_ahead)
    assert found["drawn"] == [0]
    assert found["values"] == [0, 1, 2]
    assert "a bad line" in found["error"]
    found, left = process.run(placed_before_waiting)
    assert found[:3] == [2, 3, 3]
    assert not left
