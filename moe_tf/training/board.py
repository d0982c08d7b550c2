"""A trainer's own numbers beside the balance of its experts."""

import time

import numpy as np
import tensorflow as tf

from moe_tf import tags
from moe_tf.callbacks import LoadBalanceBoard


class TrainingBoard(LoadBalanceBoard):
    """`LoadBalanceBoard` plus loss, perplexity, learning rate and speed.

    One callback, because TensorBoard wants one writer a directory. Training
    figures are means over the steps since the point before; Keras logs means
    since the epoch began, which lag. For models of `compile_for_words`.
    """

    def on_epoch_begin(self, epoch, logs=None):
        # Keras resets its metrics here, and evaluates between epochs.
        self._sums = {}
        self._since = time.perf_counter()

    def write_training(self, logs):
        super().write_training(logs)
        nats = logs["words"] * np.log(logs["perplexity"])
        new_words = self._new("words", logs["words"])
        new_nats = self._new("nats", nats)
        (loss,) = (m for m in self.model.metrics if m.name == "loss")
        new_loss = self._new("loss", float(loss.total))
        new_count = self._new("count", float(loss.count))
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        with self.writer("train").as_default(self.step()):
            tf.summary.scalar(tags.LOSS, new_loss / new_count)
            tf.summary.scalar(tags.PERPLEXITY, np.exp(new_nats / new_words))
            tf.summary.scalar(tags.WORDS_PER_SECOND, new_words / seconds)
            tf.summary.scalar(
                tags.LEARNING_RATE, self.model.optimizer.learning_rate
            )

    def write_validation(self, logs):
        super().write_validation(logs)
        with self.writer("validation").as_default(self.step()):
            tf.summary.scalar(tags.LOSS, logs["loss"])
            tf.summary.scalar(tags.PERPLEXITY, logs["perplexity"])

    def _new(self, name, total):
        """What a sum has gained since it was asked for last."""
        gained = total - self._sums.get(name, 0.0)
        self._sums[name] = total
        return gained
