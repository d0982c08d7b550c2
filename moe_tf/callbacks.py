"""A Keras callback that writes the load balance to TensorBoard."""

import contextlib
import os
from collections.abc import Iterator

import keras
import numpy as np
import tensorflow as tf

from moe_tf import checks
from moe_tf import metrics
from moe_tf import tags

__all__ = [
    "LoadBalanceBoard",
]


def __dir__() -> list[str]:
    return __all__


class LoadBalanceBoard(keras.callbacks.Callback):
    """Writes the paper's balance statistics of every `SparseMoE` layer.

    For each layer: CV(importance), CV(load), max / mean load, the dropped
    fraction and the router's losses before their weights as scalars, and a
    histogram over the experts of load / mean load.
    The run `train` has the statistics of single training batches, the run
    `validation` the means over the validation batches. The x axis is the
    optimizer's step.

    Give the callback its own directory, or start TensorBoard with
    `--reload_multifile=true`: by default TensorBoard follows only the newest
    event file of a directory.

    Args:
        log_dir: directory for the runs.
        update_freq: int, steps between two writes in training. Defaults to
            `100`.

    Reference:
     - [Shazeer et al., 2017](https://arxiv.org/abs/1701.06538), appendix A,
       table 6

    Example:

    >>> import os, tempfile
    >>> model = keras.Sequential([moe_tf.SparseMoE(4, hidden_units=8, k=2)])
    >>> model.compile("sgd", "mse")
    >>> x = np.ones((8, 3), "float32")
    >>> with tempfile.TemporaryDirectory() as log_dir:
    ...     board = moe_tf.LoadBalanceBoard(log_dir, update_freq=1)
    ...     _ = model.fit(x, x, callbacks=[board], verbose=0)
    ...     print(os.listdir(log_dir))
    ['train']
    """

    def __init__(
        self, log_dir: str | os.PathLike, update_freq: int = 100
    ) -> None:
        super().__init__()
        checks.at_least("update_freq", update_freq, 1)
        self.log_dir = log_dir
        self.update_freq = update_freq
        self._writers = {}

    def set_model(self, model):
        super().set_model(model)
        names = [balance.name for balance in self.balances()]
        if len(set(names)) < len(names):
            raise ValueError(
                "Layers must have different names to be told apart; pass "
                f"`name` to `SparseMoE`. Received: {names}"
            )

    def on_train_begin(self, logs=None):
        self._written = self.step() // self.update_freq

    def on_train_batch_end(self, batch, logs=None):
        # Counts steps, not batches: with gradient accumulation a step takes
        # several batches, with `steps_per_execution` a call several steps.
        due = self.step() // self.update_freq
        if due > self._written:
            self._written = due
            with self.disk_errors():
                self.write_training(logs or {})

    def on_test_end(self, logs=None):
        with self.disk_errors():
            self.write_validation(logs or {})
            for writer in self._writers.values():
                writer.flush()

    def on_train_end(self, logs=None):
        with self.disk_errors():
            for writer in self._writers.values():
                writer.close()
        self._writers = {}

    @contextlib.contextmanager
    def disk_errors(self) -> Iterator[None]:
        """Turns TensorFlow's errors of writing into `OSError`."""
        # Keras would take TensorFlow's for the end of the data.
        try:
            yield
        except tf.errors.OpError as error:
            raise OSError(
                f"Could not write to `log_dir`={self.log_dir}: "
                f"{error.message}. Free disk space or allow writing."
            ) from error

    def write_training(self, logs: dict) -> None:
        """Writes the statistics of the last training batch."""
        with self.writer("train").as_default(self.step()):
            worst = 0.0
            for balance in self.balances():
                values = balance.latest()
                self._write_scalars(balance.name, values)
                load_E = np.asarray(balance.load_E)
                tf.summary.histogram(
                    tags.load_per_expert(balance.name),
                    load_E / max(load_E.mean(), 1e-10),
                )
                worst = max(worst, float(values["max_over_mean_load"]))
            if self.balances():
                tf.summary.scalar(tags.WORST_MAX_OVER_MEAN_LOAD, worst)

    def write_validation(self, logs: dict) -> None:
        """Writes the means over the validation batches."""
        with self.writer("validation").as_default(self.step()):
            for balance in self.balances():
                self._write_scalars(balance.name, balance.statistics())

    def writer(self, run: str) -> tf.summary.SummaryWriter:
        """Returns the summary writer of a run, made at the first call."""
        if run not in self._writers:
            self._writers[run] = tf.summary.create_file_writer(
                os.path.join(self.log_dir, run)
            )
        return self._writers[run]

    def step(self) -> int:
        """Returns the optimizer's step."""
        return int(self.model.optimizer.iterations)

    def balances(self) -> list[metrics.ExpertBalance]:
        """Returns the `ExpertBalance` of each layer that has one."""
        # Keras lists a metric of a nested model more than once.
        unique = {id(metric): metric for metric in self.model.metrics}
        return [
            metric
            for metric in unique.values()
            if isinstance(metric, metrics.ExpertBalance)
        ]

    def _write_scalars(self, layer, values):
        for statistic, value in values.items():
            tf.summary.scalar(tags.balance(layer, statistic), value)
