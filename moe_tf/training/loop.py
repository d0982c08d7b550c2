"""Training, evaluation and dry runs of every trainer.

Training is Keras `fit`, which runs to the end or starts over. This module
adds what is missing: a run that is killed at any moment and started again
continues from its last checkpoint, and ends with the same weights as a run
that never stopped.
"""

import contextlib
import os
from typing import Any

import keras
import ml_collections
import numpy as np
from absl import logging

from moe_tf.layers import clipped_evaluation
from moe_tf.training import callbacks
from moe_tf.training import checkpoints
from moe_tf.training import variables
from moe_tf.training import workdir as workdirs
from moe_tf.training.board import TrainingBoard
from moe_tf.training.task import Task


def train(task: Task, config: ml_collections.ConfigDict, workdir: str) -> None:
    """Trains to `train.steps`, then tests the best checkpoint."""
    with _claim(task, config, workdir) as record:
        prepared = task.prepare(workdir)
        print_once(task, task.dry_run_report())
        for line in task.data_report(prepared):
            print_once(task, line)
        scorer = task.build(prepared)
        record()
        saved = RunCheckpoints(task, config, workdir, scorer)
        metadata = saved.last.restore_latest() or {"step": 0}
        if metadata["step"] < config.train.steps:
            if metadata["step"]:
                print_once(task, f"Going on from step {metadata['step']}.")
            _fit(task, config, workdir, prepared, scorer, saved, metadata)
        saved.best.restore_latest()
        _evaluate(task, prepared, scorer, ["test"])
        for line in task.example_outputs(scorer, prepared):
            print_once(task, line)
        print_once(task, f"To watch the run: tensorboard --logdir {workdir}")


def evaluate(
    task: Task,
    config: ml_collections.ConfigDict,
    workdir: str,
    name: str = "best",
) -> None:
    """Prints the quality of a checkpoint on validation and test text.

    With a capacity factor, experts drop tokens in a second evaluation as they
    do in training.

    Args:
        task: the run's task.
        config: the run's config.
        workdir: folder of the run.
        name: the folder `checkpoints/<name>`.
    """
    prepared, scorer = restore_run(task, config, workdir, name)
    splits = ["validation", "test"]
    _evaluate(task, prepared, scorer, splits)
    factor = config.moe.capacity_factor
    if factor is not None:
        print_once(
            task, f"With tokens dropped beyond moe.capacity_factor={factor}:"
        )
        with clipped_evaluation(scorer):
            _evaluate(task, prepared, scorer, splits, clipped=True)


def dry_run(
    task: Task, config: ml_collections.ConfigDict, workdir: str
) -> None:
    """Prints what a run holds and costs; allocates nothing."""
    del config, workdir
    print_once(task, task.dry_run_report())


class RunCheckpoints:
    """The checkpoints of a run.

    Attributes:
        last: `Checkpoints` of the last steps, `train.keep_checkpoints` many.
        best: `Checkpoints` of the step with the best validation perplexity.
    """

    def __init__(
        self,
        task: Task,
        config: ml_collections.ConfigDict,
        workdir: str,
        scorer: keras.Model,
    ):
        self._named = variables.named_variables(scorer)
        self._folder = os.path.join(workdir, "checkpoints")
        self._strategy = task.strategy
        self.last = self.in_folder("last", config.train.keep_checkpoints)
        self.best = self.in_folder("best")

    def in_folder(self, name: str, keep: int = 1) -> checkpoints.Checkpoints:
        """Returns the `Checkpoints` in the folder `checkpoints/<name>`."""
        return checkpoints.Checkpoints(
            os.path.join(self._folder, name),
            self._named,
            keep=keep,
            strategy=self._strategy,
        )


def restore_run(
    task: Task,
    config: ml_collections.ConfigDict,
    workdir: str,
    name: str = "best",
) -> tuple[Any, keras.Model]:
    """Restores a checkpoint of a run.

    Args:
        task: the run's task.
        config: the run's config.
        workdir: folder of the run.
        name: the folder `checkpoints/<name>`.

    Returns:
        The prepared data, and the model with the checkpoint's weights.

    Raises:
        ValueError: there is no checkpoint yet, or the workdir belongs to a
            run of another config.
    """
    workdirs.check_workdir(workdir, config, task.free_fields)
    prepared = task.prepare(workdir)
    scorer = task.build(prepared)
    saved = RunCheckpoints(task, config, workdir, scorer)
    metadata = saved.in_folder(name).restore_latest()
    if metadata is None:
        raise ValueError(
            f"There is no {name} checkpoint yet in `workdir`={workdir}; a run "
            "saves the first at its first evaluation (`train.evaluate_every`)."
        )
    logging.info("Checkpoint %s: step %d", name, metadata["step"])
    return prepared, scorer


def print_once(task: Task, text: str) -> None:
    """Prints `text` in the first process of a run."""
    if task.is_first:
        print(text, flush=True)


@contextlib.contextmanager
def _claim(task, config, workdir):
    """Claims the workdir for all processes; gives what writes the config."""
    if not task.is_first:
        yield lambda: None
        return
    with workdirs.claim_workdir(workdir, config, task.free_fields) as claim:
        yield claim.record


def _fit(task, config, workdir, prepared, scorer, saved, metadata):
    every = config.train.evaluate_every
    scorer.fit(
        task.batches(prepared, "train", start_step=metadata["step"]),
        validation_data=task.batches(prepared, "validation"),
        validation_steps=task.num_batches(prepared, "validation"),
        shuffle=False,  # the task has shuffled
        initial_epoch=metadata["step"] // every,
        epochs=config.train.steps // every,
        steps_per_epoch=every,
        verbose=0,
        callbacks=_callbacks(task, config, workdir, prepared, saved, metadata),
    )
    # Keras takes some errors for the end of the data.
    callbacks.check_step(scorer, config.train.steps)


def _callbacks(task, config, workdir, prepared, saved, metadata):
    """Callbacks of a process; only those of the first write and print."""
    keep = callbacks.KeepCheckpoints(
        saved.last,
        saved.best,
        metadata.get("best_validation_perplexity", np.inf),
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
            print_once(task, line)
