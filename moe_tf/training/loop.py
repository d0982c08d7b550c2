"""What every trainer does with a task, a config and a workdir.

Training is Keras `fit`; what `fit` lacks is here: a run that is killed at
any moment and started again goes on from its last saved state, with the same
weights as if it had never stopped.
"""

import contextlib
import os

import keras
import numpy as np
from absl import logging

from moe_tf.layers import clipped_evaluation
from moe_tf.training import callbacks
from moe_tf.training import checkpoints
from moe_tf.training import variables
from moe_tf.training import workdir as workdirs
from moe_tf.training.board import TrainingBoard
from moe_tf.training.task import Task


def train(task: Task, config, workdir):
    """Trains to `train.steps`, then tests the best state."""
    with _claim(task, config, workdir) as record:
        prepared = task.prepare(workdir)
        tell(task, task.describe())
        for line in task.describe_data(prepared):
            tell(task, line)
        scorer = task.build(prepared)
        record()
        kept = SavedStates(task, config, workdir, scorer)
        found = kept.last.restore_latest() or {"step": 0}
        if found["step"] < config.train.steps:
            if found["step"]:
                tell(task, f"Going on from step {found['step']}.")
            _fit(task, config, workdir, prepared, scorer, kept, found)
        kept.best.restore_latest()
        _evaluate(task, prepared, scorer, ["test"])
        for line in task.show(scorer, prepared):
            tell(task, line)
        tell(task, f"To watch the run: tensorboard --logdir {workdir}")


def evaluate(task: Task, config, workdir, name="best"):
    """Tells how good a state is on held-out text.

    With a capacity factor, once more with experts that drop as in training.
    """
    prepared, scorer = open_state(task, config, workdir, name)
    splits = ["validation", "test"]
    _evaluate(task, prepared, scorer, splits)
    factor = config.model.capacity_factor
    if factor is not None:
        tell(
            task, f"With tokens dropped beyond model.capacity_factor={factor}:"
        )
        with clipped_evaluation(scorer):
            _evaluate(task, prepared, scorer, splits, clipped=True)


def dry_run(task: Task, config, workdir):
    """Says what a run will hold, before anything is allocated."""
    del config, workdir
    tell(task, task.describe())


class SavedStates:
    """The saved states of a run: its `last` ones and its `best`."""

    def __init__(self, task: Task, config, workdir, scorer):
        self._named = variables.named_variables(scorer)
        self._folder = os.path.join(workdir, "checkpoints")
        self._strategy = task.strategy
        self.last = self.named("last", config.train.keep_checkpoints)
        self.best = self.named("best")

    def named(self, name, keep=1) -> checkpoints.Checkpoints:
        """The states in the folder `checkpoints/<name>`."""
        return checkpoints.Checkpoints(
            os.path.join(self._folder, name),
            self._named,
            keep=keep,
            strategy=self._strategy,
        )


def open_state(task: Task, config, workdir, name="best"):
    """The prepared data and the model in a state that was saved.

    Args:
        name: the folder `checkpoints/<name>`.

    Raises:
        ValueError: no state has been saved yet, or the workdir belongs to a
            run of another config.
    """
    workdirs.check(workdir, config, task.free_fields)
    prepared = task.prepare(workdir)
    scorer = task.build(prepared)
    found = (
        SavedStates(task, config, workdir, scorer).named(name).restore_latest()
    )
    if found is None:
        raise ValueError(
            f"There is no {name} checkpoint yet in `workdir`={workdir}; a run "
            "saves the first at its first evaluation (`train.evaluate_every`)."
        )
    logging.info("State %s: step %d", name, found["step"])
    return prepared, scorer


def tell(task: Task, text):
    """Prints, once for all processes."""
    if task.is_first:
        print(text, flush=True)


@contextlib.contextmanager
def _claim(task, config, workdir):
    """Claims the workdir for all processes; gives what records the config."""
    if not task.is_first:
        yield lambda: None
        return
    with workdirs.claim(workdir, config, task.free_fields) as claim:
        yield claim.record


def _fit(task, config, workdir, prepared, scorer, kept, found):
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
        callbacks=_callbacks(task, config, workdir, prepared, kept, found),
    )
    # Keras takes some errors for the end of the data.
    callbacks.check_step(scorer, config.train.steps)


def _callbacks(task, config, workdir, prepared, kept, found):
    """Of the first process: those of others write and print nothing."""
    keep = callbacks.KeepCheckpoints(
        kept.last, kept.best, found.get("best_validation_perplexity", np.inf)
    )
    if not task.is_first:
        return [keep]
    board = TrainingBoard(workdir, config.train.log_every)
    return [
        callbacks.DerivedLogs(),
        *task.callbacks(prepared, board),
        board,
        keras.callbacks.CSVLogger(
            os.path.join(workdir, "history.csv"), append=True
        ),
        keep,
        callbacks.ProgressBar(config.train.steps),
    ]


def _evaluate(task, prepared, scorer, splits, clipped=False):
    for split in splits:
        for line in task.evaluate(scorer, prepared, split, clipped):
            tell(task, line)
