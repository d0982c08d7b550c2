"""How evenly experts are used, in TensorBoard."""

import contextlib
import os

import keras
import numpy as np
import tensorflow as tf

from moe_tf import checks
from moe_tf import metrics
from moe_tf import tags


class LoadBalanceBoard(keras.callbacks.Callback):
    """Writes the paper's balance statistics of every `SparseMoE` layer.

    For each layer: CV(importance), CV(load), max / mean load, the dropped
    fraction and the router's losses before their weights as scalars, and a
    histogram over the experts of load / mean load.
    Training goes to the run `train`, taken from single batches; validation to
    the run `validation`, scalars as means over its batches. The x axis is the
    optimizer's step.

    Give it a directory of its own, or start TensorBoard with
    `--reload_multifile=true`: by default TensorBoard follows only the newest
    event file of a directory.

    Args:
        log_dir: directory for the runs.
        update_freq: int, steps between two writes in training. Defaults to
            `100`.

    Reference:
     - [Shazeer et al., 2017](https://arxiv.org/abs/1701.06538), appendix A,
       table 6
    """

    def __init__(self, log_dir, update_freq=100):
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
        # Not "each so many batches": several of them can make a step, and
        # several steps can make a batch of Keras's.
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
    def disk_errors(self):
        # TensorFlow's would be taken by Keras for the end of the data.
        try:
            yield
        except tf.errors.OpError as error:
            raise OSError(
                f"Could not write to `log_dir`={self.log_dir}: "
                f"{error.message}. Free disk space or allow writing."
            ) from error

    def write_training(self, logs):
        """Writes what the last training batch left behind."""
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

    def write_validation(self, logs):
        """Writes the means over the validation batches."""
        with self.writer("validation").as_default(self.step()):
            for balance in self.balances():
                self._write_scalars(balance.name, balance.statistics())

    def writer(self, run):
        """The summary writer of a run, one for each run's directory."""
        if run not in self._writers:
            self._writers[run] = tf.summary.create_file_writer(
                os.path.join(self.log_dir, run)
            )
        return self._writers[run]

    def step(self):
        return int(self.model.optimizer.iterations)

    def balances(self):
        """The `ExpertBalance` of each layer that has one."""
        # Keras lists those of nested models more than once.
        unique = {id(metric): metric for metric in self.model.metrics}
        return [
            metric
            for metric in unique.values()
            if isinstance(metric, metrics.ExpertBalance)
        ]

    def _write_scalars(self, layer, values):
        for statistic, value in values.items():
            tf.summary.scalar(tags.balance(layer, statistic), value)
