"""A trainer's own numbers beside the balance of its experts."""

import tensorflow as tf

from moe_tf import tags
from moe_tf.board.load_balance import LoadBalanceBoard


class TrainingBoard(LoadBalanceBoard):
    """`LoadBalanceBoard` plus loss, perplexity, learning rate and speed.

    One callback, because TensorBoard wants one writer a directory. Training
    figures are what `fit` logs: means since the epoch began.
    """

    _TRAINING = {
        "loss": tags.LOSS,
        "perplexity": tags.PERPLEXITY,
        "words_per_second": tags.WORDS_PER_SECOND,
    }
    _VALIDATION = {"loss": tags.LOSS, "perplexity": tags.PERPLEXITY}

    def write_training(self, logs):
        super().write_training(logs)
        with self.writer("train").as_default(self.step()):
            _write(self._TRAINING, logs)
            tf.summary.scalar(
                tags.LEARNING_RATE, self.model.optimizer.learning_rate
            )

    def write_validation(self, logs):
        super().write_validation(logs)
        with self.writer("validation").as_default(self.step()):
            _write(self._VALIDATION, logs)


def _write(tag_of, logs):
    for name, tag in tag_of.items():
        if name in logs:
            tf.summary.scalar(tag, logs[name])
