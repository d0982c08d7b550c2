"""Callbacks of every trainer: derived logs, progress, checkpoints."""

import math
import sys
import time

import keras
from absl import logging

from moe_tf.training import checkpoints


class DerivedLogs(keras.callbacks.Callback):
    """Adds two scalars to the logs, for the callbacks after this one.

    `words_per_second`: words, padding excluded, since the second batch of the
    epoch; the first batch may include a compilation. `worst_load`: the
    largest max / mean load of the mixture-of-experts layers, if there are
    any; 1 is perfect balance.
    """

    def on_epoch_begin(self, epoch, logs=None):
        self._first = None
        self._derived = {}

    def on_train_batch_end(self, batch, logs=None):
        now, words = time.perf_counter(), float(logs["words"])
        if self._first is None:
            self._first = now, words
        else:
            then, words_then = self._first
            rate = (words - words_then) / max(now - then, 1e-9)
            self._derived["words_per_second"] = rate
        loads = [
            float(value)
            for name, value in logs.items()
            if name.endswith("_max_over_mean_load")
        ]
        if loads:
            self._derived["worst_load"] = max(loads)
        logs.update(self._derived)

    def on_epoch_end(self, epoch, logs=None):
        logs.update(self._derived)


class ProgressBar(keras.callbacks.Callback):
    """Shows loss, perplexity, words/s and the worst layer's balance.

    On a terminal it is a bar; elsewhere, one line after each evaluation.

    Args:
        total_steps: steps of the run.
    """

    _SHOWN = ("loss", "perplexity", "words_per_second", "worst_load")
    _SHOWN_AT_END = (*_SHOWN, "val_perplexity")

    def __init__(self, total_steps: int):
        super().__init__()
        self.total_steps = total_steps

    def on_train_begin(self, logs=None):
        self._step = int(self.model.optimizer.iterations)
        self._bar = None
        if sys.stdout.isatty():
            self._bar = keras.utils.Progbar(
                self.total_steps,
                stateful_metrics=self._SHOWN_AT_END,
                unit_name="step",
            )

    def on_train_batch_end(self, batch, logs=None):
        self._step += 1
        if self._bar is not None:
            self._bar.update(self._step, _pick(self._SHOWN, logs), False)

    def on_epoch_end(self, epoch, logs=None):
        scalars = _pick(self._SHOWN_AT_END, logs)
        if self._bar is not None:
            self._bar.update(
                self._step, scalars, finalize=self._step == self.total_steps
            )
        else:
            text = ", ".join(f"{name} {value:.4g}" for name, value in scalars)
            print(f"step {self._step}/{self.total_steps}: {text}", flush=True)


class KeepCheckpoints(keras.callbacks.Callback):
    """Saves a checkpoint after each evaluation, and the best one apart.

    A checkpoint is saved after its evaluation, so a run that continues from
    there repeats no evaluation and misses none.

    Args:
        last: `Checkpoints` of the latest steps.
        best: `Checkpoints` of the step with the lowest validation perplexity.
        best_perplexity: the lowest so far. Defaults to infinity.

    Raises:
        FloatingPointError: a loss is not finite; nothing is saved then.
        RuntimeError: the epoch was cut short; nothing is saved then.
    """

    def __init__(
        self,
        last: checkpoints.Checkpoints,
        best: checkpoints.Checkpoints,
        best_perplexity: float = math.inf,
    ):
        super().__init__()
        self.last = last
        self.best = best
        self.best_perplexity = best_perplexity

    def on_train_batch_end(self, batch, logs=None):
        self._check(logs, "loss")

    def on_epoch_end(self, epoch, logs=None):
        self._check(logs, "val_loss")
        step = check_step(self.model, (epoch + 1) * self.params["steps"])
        perplexity = float(logs["val_perplexity"])
        is_best = perplexity < self.best_perplexity
        self.best_perplexity = min(perplexity, self.best_perplexity)
        metadata = {
            "validation_perplexity": perplexity,
            "best_validation_perplexity": self.best_perplexity,
        }
        if is_best:
            self.best.save(step, metadata)
        # After the best one, whose perplexity `last` has in its metadata.
        path = self.last.save(step, metadata)
        logging.info("Saved step %d in %s", step, path)

    def _check(self, logs, name):
        if math.isfinite(logs[name]):
            return
        step = int(self.model.optimizer.iterations)
        saved = self.last.latest_step()
        newest = f"The last is of step {saved}" if saved else "None was saved"
        raise FloatingPointError(
            f"`{name}` is {logs[name]} at step {step}. {newest}. A lower "
            "`train.learning_rate`, a longer `train.warmup_steps` or "
            "`train.clip_norm` may help."
        )


def check_step(model: keras.Model, expected: int) -> int:
    """Returns the optimizer's step, which must be `expected`.

    Keras takes every `OutOfRangeError` for the end of the data, and silently
    ends the epoch there.

    Raises:
        RuntimeError: the step is another one.
    """
    step = int(model.optimizer.iterations)
    if step != expected:
        raise RuntimeError(
            f"Training broke off at step {step} instead of {expected}, and "
            "Keras did not say why. Nothing was saved of the steps since the "
            "last evaluation; the same command goes on from there."
        )
    return step


def _pick(names, logs):
    return [(name, float(logs[name])) for name in names if name in logs]
