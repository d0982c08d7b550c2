"""Two processes of two devices train as one process of four, and as one."""

import contextlib
import functools
import re
import signal
import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.experimental import dtensor

from moe_tf.distribute import MeshStrategy
from moe_tf.distribute import placement
from tests import process
from tests.distribute import equality_test
from tests.distribute import models

BATCH = 16
ALL_AXES = ({"batch": 4}, {"expert": 2, "batch": 2})


def make(scope=None):
    keras.utils.set_random_seed(0)
    keras.backend.clear_session()
    with scope or contextlib.nullcontext():
        model = models.language_model()
        model.compile(
            keras.optimizers.Adam(0.01),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        return models.build_slots(model)


def own_batches(strategy):
    """Batches of the rows that this process reads."""
    x, y = equality_test.data()
    if strategy is None:
        return tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)
    size = BATCH // strategy.input_context.num_input_pipelines
    x, y = (
        np.concatenate([strategy.own_rows(rows) for rows in np.split(part, 4)])
        for part in (x, y)
    )
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(size)


def values(model, strategy):
    variables = model.variables + model.optimizer.variables
    if strategy is None:
        return [(v.path, v.numpy()) for v in variables]
    return [(v.path, strategy.fetch(v)) for v in variables]


def train(strategy, every_way):
    """20 steps, then all that users read; the same on every process."""
    model = make(strategy and strategy.scope())
    data = own_batches(strategy)
    found = dict(model.fit(data, epochs=5, verbose=0).history)
    found.update(values(model, strategy))
    found["evaluate"] = np.array(model.evaluate(data, verbose=0))
    found["predict"] = model.predict(data, verbose=0)
    if every_way:
        found.update(train_in_other_ways(model, strategy))
    return found


def train_in_other_ways(model, strategy):
    found = {}
    # Batches of 16, 16 and 14, which all read; the axis does not divide 14.
    x, y = (part[:46] for part in equality_test.data())
    history = model.fit(x, y, batch_size=BATCH, verbose=0).history
    found["arrays"] = np.array(history["loss"])
    whole = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)
    rows = x[:BATCH], y[:BATCH]
    if strategy is not None:
        whole = strategy.shard_batches(whole)
        rows = strategy.own_rows(rows)
    found["whole"] = np.array(model.evaluate(whole, verbose=0))
    found["rows"] = model.predict(x, batch_size=BATCH, verbose=0)
    found["train_on_batch"] = np.array(model.train_on_batch(*rows))
    found["predict_on_batch"] = model.predict_on_batch(rows[0])
    return found


def assign_and_read(strategy):
    """A new value of a sharded kernel: what is read, and where it lies."""
    model = make(strategy.scope())
    kernel = model.get_layer("moe").experts.in_EDF
    new = np.random.default_rng(3).random(kernel.shape).astype("float32")
    strategy.assign(kernel, new)
    value = kernel.value.read_value()
    held = [part.numpy() for part in dtensor.unpack(value)]
    places = strategy.mesh.local_device_locations()
    axis = kernel.value.spec[0]
    shards = np.split(new, strategy.axes[axis])
    correct = [
        np.array_equal(part, shards[place[axis]])
        for part, place in zip(held, places, strict=True)
    ]
    read = [strategy.fetch(kernel), strategy.fetch(kernel.value)]
    read += [kernel.numpy(), np.asarray(kernel)]
    placement._PIECE_BYTES = 500  # Of 1 KiB.
    read.append(strategy.fetch(kernel))
    return correct, [np.array_equal(new, value) for value in read]


def run(axes):
    strategy = MeshStrategy(axes)
    there = strategy.num_processes, strategy.process_id, strategy.is_first
    found = train(strategy, every_way=axes == ALL_AXES[0])
    return there, found, assign_and_read(strategy)


def run_all():
    return [run(axes) for axes in ALL_AXES]


def run_on_one_device():
    return train(None, every_way=True)


def run_all_and_differ():
    return run_all(), mismatches()


@functools.cache
def results():
    """Of one device, of one process with four, of two; what these raise."""
    alone = [process.Process(run) for run in (run_on_one_device, run_all)]
    pair = process.start_cluster(run_all_and_differ)
    try:
        one, four = (each.result() for each in alone)
        runs, raised = zip(*(each.result() for each in pair), strict=True)
    finally:
        for each in alone + pair:
            each.close()
    return one, four, runs, raised


@pytest.mark.thorough
@pytest.mark.parametrize("axes", ALL_AXES, ids=str)
def test_equals_one_device(axes):
    one, four, pair, _ = results()
    index = ALL_AXES.index(axes)
    assert np.ptp(one["loss"]) > 0.1  # It learns.
    for there, found, _ in (four[index], pair[0][index], pair[1][index]):
        assert len(found) == len(one) - (5 if index else 0)
        for name, value in found.items():
            np.testing.assert_allclose(
                value, one[name], atol=5e-6, err_msg=f"{name} {there}"
            )


@pytest.mark.thorough
@pytest.mark.parametrize("axes", ALL_AXES, ids=str)
def test_processes_and_variables(axes):
    _, four, pair, _ = results()
    index = ALL_AXES.index(axes)
    runs = [run[index] for run in (four, *pair)]
    assert [there for there, _, _ in runs] == [
        (1, 0, True),
        (2, 0, True),
        (2, 1, False),
    ]
    for _, _, (correct, read) in runs:
        assert all(correct) and all(read), (correct, read)


class Stop(keras.callbacks.Callback):
    """Stops the training of one process, after two batches."""

    def __init__(self, stops):
        super().__init__()
        self._stops = stops

    def on_train_batch_end(self, batch, logs=None):
        self.model.stop_training = self._stops and batch == 1


def mismatches():
    """What each process raises where it does not do what the other does."""
    strategy = MeshStrategy({"batch": 4})
    first = strategy.is_first
    model = make(strategy.scope())
    x, y = (strategy.own_rows(part) for part in equality_test.data())

    def batches(rows, size=8):
        data = tf.data.Dataset.from_tensor_slices((x[:rows], y[:rows]))
        return data.batch(size)

    def unknown(rows):
        return batches(rows).filter(lambda x, y: True)

    kernel = model.get_layer("moe").experts.in_EDF
    cases = {
        "length": lambda: model.fit(batches(24 if first else 32), verbose=0),
        "end": lambda: model.fit(unknown(24 if first else 32), verbose=0),
        "shape": lambda: model.evaluate(
            batches(24, 8) if first else batches(12, 4), verbose=0
        ),
        "values": lambda: model.fit(x[:8] + first, y[:8], verbose=0),
        "stop": lambda: model.fit(
            unknown(32), callbacks=[Stop(first)], verbose=0
        ),
        "epochs": lambda: model.fit(batches(8), epochs=1 + first, verbose=0),
        "way": lambda: (
            model.train_on_batch(x[:8], y[:8])
            if first
            else model.test_on_batch(x[:8], y[:8])
        ),
        "read": lambda: (
            strategy.fetch(kernel)
            if first
            else model.evaluate(batches(8), verbose=0)
        ),
        "predict": lambda: model.predict(unknown(8 + 8 * first), verbose=0),
        "axes": lambda: MeshStrategy(
            {"batch": 4} if first else {"batch": 2, "expert": 2}
        ),
        "rows": lambda: strategy.own_rows(x[:6]),
        "assign": lambda: strategy.assign(kernel, x),
        "part": lambda: model.fit(batches(8, 3), verbose=0),
    }
    return {name: raised(case) for name, case in cases.items()}


def raised(case):
    try:
        case()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.thorough
@pytest.mark.parametrize(
    "case,message",
    [
        ("length", "data of 3 batches in process 0; data of 4 batches in p"),
        ("end", "end of the data after 3 batches in process 0; batch 4 in p"),
        ("shape", r"batch 1 .* with something else. Here: \([48], 6\) int32"),
        ("values", "batch 1 in process 0, 1, but with something else"),
        ("stop", "the end of `fit` in process 0; batch 3 in process 1"),
        ("epochs", "batch 1 in process 0; the end of `fit` in process 1"),
        ("way", "a method for one batch in .* Here: t[a-z]*_on_batch"),
        ("read", "a sharded variable in process 0; data of 1 batches in p"),
        ("predict", "batch 2 in process 0; the end of the data after 1 bat"),
        ("axes", "a mesh in process 0, 1, but .* Here: axes={'batch': [24]"),
        ("rows", "ValueError: A batch must have a multiple of 4 examples"),
        ("assign", "`value` must have the shape of moe/experts/expert_in_k"),
        ("part", "ValueError: The part of a batch that a process reads must"),
    ],
)
def test_processes_that_differ(case, message):
    for found in results()[-1]:
        assert re.search(message, found[case]), found[case]


def print_steps(count):
    if count == 5:
        print("five steps", flush=True)


class Tell(keras.callbacks.Callback):
    """Prints that the work goes on, and reads a sharded variable."""

    def on_train_batch_end(self, batch, logs=None):
        self.model.get_layer("moe").experts.in_EDF.numpy()
        print_steps(batch)

    def on_test_batch_end(self, batch, logs=None):
        print_steps(batch)

    def on_predict_batch_end(self, batch, logs=None):
        print_steps(batch)


def work(way):
    """Goes on for ever."""
    strategy = MeshStrategy({"batch": 4})
    model = make(strategy.scope())
    data = own_batches(strategy).repeat()
    options = {"callbacks": [Tell()], "verbose": 0}
    if way == "fit":
        model.fit(data, steps_per_epoch=10**9, **options)
    if way == "train_on_batch":
        for step, batch in enumerate(data):
            model.train_on_batch(*batch)
            print_steps(step)
    if way == "evaluate":
        model.evaluate(data, **options)
    if way == "predict":
        model.predict(data, **options)


LOSSES = [
    ("evaluate", 0, signal.SIGSTOP),
    ("fit", 0, signal.SIGKILL),
]


@pytest.mark.thorough
def test_a_lost_process_ends_the_others():
    """Process 0, which leads the cluster, is killed, or frozen."""
    lose(LOSSES)


@pytest.mark.slow
def test_another_lost_process_ends_the_others():
    lose(
        [
            ("predict", 1, signal.SIGSTOP),
            ("train_on_batch", 1, signal.SIGKILL),
        ]
    )


def lose(losses):
    pairs, begun = [], []
    try:
        for way, lost, number in losses:
            pair = process.start_cluster(work, way)
            pairs.append(pair)
            for each in pair:
                each.wait_until_printed("five steps")
            pair[lost].signal(number)
            begun.append(time.monotonic())
            if number == signal.SIGKILL:
                assert pair[1 - lost].wait(60) == 1
        for (_, lost, _), pair, begin in zip(losses, pairs, begun, strict=True):
            survivor = pair[1 - lost]
            assert survivor.wait(60 - (time.monotonic() - begin)) == 1
            message = f"RuntimeError: Lost process {lost} (localhost:"
            assert message in survivor.printed(), survivor.printed()
    finally:
        for each in sum(pairs, []):
            each.close()
