"""Patches Keras's TensorFlow trainer for models on a mesh.

Models of other strategies, or of none, are not affected. Five changes:

- Batches are placed on the mesh, the next one while a step runs.
- A step is traced once for each shape of batches. With Keras's one trace for
  many shapes, sizes would be unknown and layers could not see how a tensor is
  sharded.
- An `OutOfRangeError` inside a step is an error, not the end of the data.
- The model is built from the dataset's specs, so that no batch is lost.
- Predictions are fetched to the host.

With several processes, `fit`, `evaluate` and `predict` end together, and a
lost process is reported.
"""

import contextlib
import functools
import itertools

import keras
import tensorflow as tf
from keras.src.backend.tensorflow.trainer import TensorFlowTrainer
from tensorflow.experimental import dtensor
from tensorflow.python.eager import context

from moe_tf.distribute import datasets
from moe_tf.distribute import placement
from moe_tf.distribute import process_sync


def install() -> None:
    """Patches Keras's trainer; a second call does nothing."""
    if hasattr(TensorFlowTrainer, "_steps_on_mesh"):
        return
    TensorFlowTrainer._steps_on_mesh = True
    for name, extend in (
        ("_make_function", _placing_batches),
        ("make_predict_function", _fetching_predictions),
        ("_maybe_symbolic_build", _building_from_specs),
        ("fit", _ending_together),
        ("evaluate", _ending_together),
        ("predict", _ending_together),
        ("train_on_batch", _beginning_together),
        ("test_on_batch", _beginning_together),
        ("predict_on_batch", _beginning_together),
    ):
        method = getattr(TensorFlowTrainer, name)
        extended = functools.wraps(method)(extend(method))
        setattr(TensorFlowTrainer, name, extended)


def _mesh_strategy(model):
    strategy = model.distribute_strategy
    return strategy if hasattr(strategy, "put_batch") else None


def _placing_batches(make_function):
    """Wraps `_make_function`: places batches; errors do not end the data.

    While a step runs, the next batch is placed. With `steps_per_execution`,
    that is the first batch of the next execution.
    """

    def make(self, step_function):
        strategy = _mesh_strategy(self)
        if strategy is None:
            return make_function(self, step_function)
        functions = {}

        def run(iterator):
            strategy.check_once(self)
            batches = [
                strategy.put_batch(batch)
                for batch in itertools.islice(
                    iterator, self.steps_per_execution
                )
            ]
            if not batches:
                raise StopIteration
            shapes = _shapes(batches)
            if shapes not in functions:
                functions[shapes] = make_function(self, step_function)
            with _finishing_steps():
                logs = functions[shapes](iter(batches))
                if isinstance(iterator, datasets.MeshIterator):
                    iterator.look_ahead()
            return logs

        return run

    return make


def _fetching_predictions(make_predict_function):
    """Wraps `make_predict_function`: fetches outputs to the host."""

    def make(self, force=False):
        before = self.predict_function
        make_predict_function(self, force)
        strategy = _mesh_strategy(self)
        if strategy is None or (before is not None and not force):
            return
        functions = {}

        def function_for(batch):
            shapes = _shapes(batch)
            if shapes not in functions:
                make_predict_function(self, force=True)
                functions[shapes] = self.predict_function
                self.predict_function = run
            return functions[shapes]

        def run(batches):
            strategy.check_once(self)
            outputs = []
            for batch in batches:
                with _finishing_steps():
                    batch = strategy.put_batch(batch)
                    output = function_for(batch)([batch])
                    outputs.append(keras.tree.map_structure(_fetch, output))
            with placement.host():
                return keras.tree.map_structure(
                    lambda *parts: tf.concat(parts, axis=0), *outputs
                )

        self.predict_function = run

    return make


def _building_from_specs(maybe_symbolic_build):
    """Wraps `_maybe_symbolic_build`: draws no batch from the data."""

    def build(self, iterator=None, data_batch=None):
        if _mesh_strategy(self) is not None and iterator is not None:
            _agree_on_length(iterator.num_batches)
            spec = iterator._distributed_dataset.element_spec
            parts = tf.nest.flatten(spec)
            if all(_has_rank(part) for part in parts):
                iterator, data_batch = None, spec
        return maybe_symbolic_build(
            self, iterator=iterator, data_batch=data_batch
        )

    return build


def _agree_on_length(num_batches):
    if num_batches is None:
        process_sync.agree("data of unknown length")
    else:
        process_sync.agree("data of {} batches", num_batches)


def _ending_together(method):
    """Wraps `fit`, `evaluate`, `predict`: processes end them together."""

    def run(self, *args, **kwargs):
        if _mesh_strategy(self) is None:
            return method(self, *args, **kwargs)
        with process_sync.reporting_lost_processes():
            result = method(self, *args, **kwargs)
        process_sync.agree(f"the end of `{method.__name__}`")
        return result

    return run


def _beginning_together(method):
    """Wraps `train_on_batch` and similar: processes begin them together."""

    def run(self, *args, **kwargs):
        if _mesh_strategy(self) is None:
            return method(self, *args, **kwargs)
        if dtensor.num_clients() > 1:
            shapes = process_sync.describe_shapes((args, kwargs))
            detail = f"{method.__name__} {shapes}"
            process_sync.agree("a method for one batch", 0, detail)
        with process_sync.reporting_lost_processes():
            return method(self, *args, **kwargs)

    return run


def _has_rank(spec):
    return isinstance(spec, tf.TensorSpec) and spec.shape.rank is not None


@contextlib.contextmanager
def _finishing_steps():
    """Waits for the devices at the end, so that a step's errors surface."""
    try:
        yield
        context.async_wait()
    except (tf.errors.OutOfRangeError, StopIteration) as error:
        lost = (
            process_sync.lost_process_error(error)
            if hasattr(error, "op")
            else None
        )
        raise lost or datasets.not_the_end(error, "A step failed") from error


def _shapes(nest):
    return tuple(
        tuple(part.shape) if hasattr(part, "shape") else None
        for part in tf.nest.flatten(nest)
    )


def _fetch(output):
    with placement.host():
        if dtensor.is_dtensor(output):
            return tf.constant(placement.get(output))
        return tf.convert_to_tensor(output)
