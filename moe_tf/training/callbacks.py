"""What a trainer adds to `fit`: derived figures, progress, safe keeping."""

import math
import sys
import time

import keras
from absl import logging


class DerivedLogs(keras.callbacks.Callback):
    """Adds two figures to the logs; to be put before callbacks that read them.

    `words_per_second`: real words since the second batch of the epoch (the
    first may be compiling). `worst_load`: the largest max / mean load of any
    mixture-of-experts layer, where there is one; 1 is perfect balance.
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

    A bar on a terminal, one line after each evaluation elsewhere.
    """

    _SHOWN = ("loss", "perplexity", "words_per_second", "worst_load")
    _SHOWN_AT_END = (*_SHOWN, "val_perplexity")

    def __init__(self, total_steps):
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
        figures = _pick(self._SHOWN_AT_END, logs)
        if self._bar is not None:
            self._bar.update(
                self._step, figures, finalize=self._step == self.total_steps
            )
        else:
            text = ", ".join(f"{name} {value:.4g}" for name, value in figures)
            print(f"step {self._step}/{self.total_steps}: {text}", flush=True)


class KeepCheckpoints(keras.callbacks.Callback):
    """Saves the last and the best state after each evaluation.

    The state is saved when `fit` has evaluated it, so a run that goes on from
    it repeats no evaluation and loses none.

    Args:
        last: `Checkpoints` for the latest states.
        best: `Checkpoints` for the state of lowest validation perplexity.
        best_perplexity: float, the lowest so far. Defaults to infinity.

    Raises:
        FloatingPointError: a loss is not finite; nothing is saved then.
        RuntimeError: the epoch was cut short; nothing is saved then.
    """

    def __init__(self, last, best, best_perplexity=math.inf):
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
        # Last: what `last` says of the best is then true.
        path = self.last.save(step, metadata)
        logging.info("Saved step %d in %s", step, path)

    def _check(self, logs, name):
        if math.isfinite(logs[name]):
            return
        step = int(self.model.optimizer.iterations)
        saved = self.last.latest_step()
        kept = f"The last is of step {saved}" if saved else "None was saved"
        raise FloatingPointError(
            f"`{name}` is {logs[name]} at step {step}. {kept}. A lower "
            "`train.learning_rate`, a longer `train.warmup_steps` or "
            "`train.clip_norm` may help."
        )


def check_step(model, expected):
    """The optimizer's step, which must be `expected`.

    Keras takes an `OutOfRangeError` of any origin for the end of the data,
    and would end the epoch there as if all were well.

    Raises:
        RuntimeError: it is not.
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
