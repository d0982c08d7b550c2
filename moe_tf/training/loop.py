"""The modes of a trainer: what can be done with a task, a config, a workdir.

Training is Keras `fit`; what `fit` lacks is here: a run that is killed at
any moment and started again goes on from its last saved state, with the same
weights as if it had never stopped.
"""

import contextlib
import functools
import os
import sys

import keras
import numpy as np
from absl import logging

from moe_tf.board.training import TrainingBoard
from moe_tf.layers import moe
from moe_tf.training import callbacks
from moe_tf.training import checkpoints
from moe_tf.training import dry_run as dry_runs
from moe_tf.training import scoring
from moe_tf.training import variables
from moe_tf.training import workdir as workdirs


def train(task, config, workdir):
    """Trains to `train.steps`, then tests the best state."""
    with _claim(task, config, workdir) as record:
        prepared = task.prepare(workdir)
        _tell(task, dry_runs.describe(task, config))
        _tell_data(task, config, prepared)
        scorer = task.build(prepared)
        record()
        last, best = _checkpoints(task, config, workdir, scorer)
        found = last.restore_latest() or {"step": 0}
        if found["step"] < config.train.steps:
            if found["step"]:
                _tell(task, f"Going on from step {found['step']}.")
            _fit(task, config, workdir, prepared, scorer, last, best, found)
        best.restore_latest()
        _evaluate(task, prepared, scorer, ["test"])
        _print_samples(task, prepared, scorer)
        _tell(task, f"To watch the run: tensorboard --logdir {workdir}")


def evaluate(task, config, workdir):
    """Prints the perplexity of the best state on held-out text.

    With a capacity factor, once more with experts that drop as in training.
    """
    prepared, scorer = _open_best(task, config, workdir)
    splits = ["validation", "test"]
    _evaluate(task, prepared, scorer, splits)
    factor = config.model.capacity_factor
    if factor is not None:
        _tell(
            task, f"With tokens dropped beyond model.capacity_factor={factor}:"
        )
        with moe.clipped_evaluation(scorer):
            _evaluate(task, prepared, scorer, splits)


def sample(task, config, workdir):
    """Prints sentences drawn from the best state."""
    prepared, scorer = _open_best(task, config, workdir)
    _print_samples(task, prepared, scorer)


def score(task, config, workdir):
    """Scores the sentences of standard input, one a line.

    Prints for each: the natural logarithm of its probability, its words with
    the end counted, its unknown words, and its perplexity per word, separated
    by tabs, in the order of the input. A line that cannot be scored gives
    the reason instead.
    """
    if task.strategy is not None and task.strategy.num_processes > 1:
        raise ValueError(
            "`mode`=score reads standard input, which one process has: start "
            "one alone, with another `mesh` if need be."
        )
    prepared, scorer = _open_best(task, config, workdir)
    total, num_words = 0.0, 0
    print("log_probability\twords\tunknown\tperplexity")
    score_batch = functools.partial(task.score, scorer)
    lines = sys.stdin.buffer
    for scored in scoring.score_lines(score_batch, prepared, lines):
        if scored.skipped:
            print(f"skipped: {scored.skipped}")
            continue
        total += scored.log_probability
        num_words += scored.words
        perplexity = np.exp(-scored.log_probability / scored.words)
        print(
            f"{scored.log_probability:.4f}\t{scored.words}\t"
            f"{scored.unknown}\t{perplexity:.2f}"
        )
    if num_words:
        perplexity = np.exp(-total / num_words)
        logging.info("%d words, perplexity %.2f", num_words, perplexity)


def dry_run(task, config, workdir):
    """Says what a run will hold, before anything is allocated."""
    del workdir
    _tell(task, dry_runs.describe(task, config))


MODES = {
    "train": train,
    "evaluate": evaluate,
    "sample": sample,
    "score": score,
    "dry_run": dry_run,
}


@contextlib.contextmanager
def _claim(task, config, workdir):
    """Claims the workdir for all processes; gives what records the config."""
    if not task.is_first:
        yield lambda: None
        return
    with workdirs.claim(workdir, config, task.free_fields) as claim:
        yield claim.record


def _fit(task, config, workdir, prepared, scorer, last, best, found):
    every = config.train.evaluate_every
    scorer.fit(
        task.batches(prepared, "train", start_step=found["step"]),
        validation_data=task.batches(prepared, "validation"),
        validation_steps=task.num_batches(prepared, "validation"),
        shuffle=False,  # the task has shuffled
        initial_epoch=found["step"] // every,
        epochs=config.train.steps // every,
        steps_per_epoch=every,
        verbose=0,
        callbacks=_callbacks(task, config, workdir, last, best, found),
    )
    # Keras takes some errors for the end of the data.
    callbacks.check_step(scorer, config.train.steps)


def _callbacks(task, config, workdir, last, best, found):
    """Of the first process: those of others write and print nothing."""
    keep = callbacks.KeepCheckpoints(
        last, best, found.get("best_validation_perplexity", np.inf)
    )
    if not task.is_first:
        return [keep]
    return [
        callbacks.DerivedLogs(),
        TrainingBoard(workdir, config.train.log_every),
        keras.callbacks.CSVLogger(
            os.path.join(workdir, "history.csv"), append=True
        ),
        keep,
        callbacks.ProgressBar(config.train.steps),
    ]


def _checkpoints(task, config, workdir, scorer):
    named = variables.named_variables(scorer)
    folder = os.path.join(workdir, "checkpoints")
    return (
        checkpoints.Checkpoints(
            os.path.join(folder, "last"),
            named,
            keep=config.train.keep_checkpoints,
            strategy=task.strategy,
        ),
        checkpoints.Checkpoints(
            os.path.join(folder, "best"), named, keep=1, strategy=task.strategy
        ),
    )


def _open_best(task, config, workdir):
    workdirs.check(workdir, config, task.free_fields)
    prepared = task.prepare(workdir)
    scorer = task.build(prepared)
    _, best = _checkpoints(task, config, workdir, scorer)
    found = best.restore_latest()
    if found is None:
        raise ValueError(
            f"There is no checkpoint yet in `workdir`={workdir}; a run saves "
            "the first at its first evaluation (`train.evaluate_every`)."
        )
    logging.info("Best state so far: step %d", found["step"])
    return prepared, scorer


def _evaluate(task, prepared, scorer, splits):
    for split in splits:
        figures = scorer.evaluate(
            task.batches(prepared, split),
            steps=task.num_batches(prepared, split),
            return_dict=True,
            verbose=0,
        )
        statistics = prepared.statistics[split]
        _tell(
            task,
            f"{split} perplexity {figures['perplexity']:.2f} over "
            f"{int(figures['words'])} words, ends of sentences counted "
            f"({100 * statistics.unknown_rate:.2f}% unknown)",
        )


def _tell_data(task, config, prepared):
    for split, found in prepared.statistics.items():
        skipped = sum(found.skipped.values()) - found.skipped["blank"]
        _tell(
            task,
            f"{split}: {found.lines:,} sentences, {found.words:,} words with "
            f"ends, {100 * found.unknown_rate:.2f}% unknown, {skipped:,} "
            "lines skipped",
        )
    passes = config.train.steps / task.num_batches(prepared, "train")
    _tell(
        task, f"{config.train.steps:,} steps are {passes:.2f} passes over train"
    )


def _print_samples(task, prepared, scorer):
    for sentence in task.sample(scorer, prepared):
        _tell(task, f"sample: {sentence}")


def _tell(task, text):
    if task.is_first:
        print(text, flush=True)
