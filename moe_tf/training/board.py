"""Board of a trainer: loss and speed beside the experts' balance."""

import time

import numpy as np
import tensorflow as tf

from moe_tf import tags
from moe_tf.callbacks import LoadBalanceBoard


class TrainingBoard(LoadBalanceBoard):
    """`LoadBalanceBoard` plus loss, perplexity, learning rate and speed.

    It is one callback, because TensorBoard wants one writer a directory.
    Training scalars are means over the steps since the previous point; the
    means in Keras's logs begin with the epoch, so they lag behind. The model
    must be compiled by `compile_for_words`.
    """

    def on_epoch_begin(self, epoch, logs=None):
        # Keras resets its metrics here, and evaluates between epochs.
        self._sums = {}
        self._since = time.perf_counter()

    def write_training(self, logs: dict) -> None:
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

    def write_validation(self, logs: dict) -> None:
        super().write_validation(logs)
        with self.writer("validation").as_default(self.step()):
            tf.summary.scalar(tags.LOSS, logs["loss"])
            tf.summary.scalar(tags.PERPLEXITY, logs["perplexity"])

    def _new(self, name, total):
        """Returns the increase of a sum since the previous call."""
        gained = total - self._sums.get(name, 0.0)
        self._sums[name] = total
        return gained
