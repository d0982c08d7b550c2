"""Base class of the trainers' tasks."""

import abc
import contextlib
import dataclasses
from typing import Any

import keras
import ml_collections
import tensorflow as tf

from moe_tf.distribute import MeshStrategy
from moe_tf.training import optimizer
from moe_tf.training.board import TrainingBoard


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """Model, data and loss of a run, made from its config.

    Attributes:
        config: the run's config. The task sets `data.rows_multiple` where a
            mesh or token groups need it.
        strategy: optional `MeshStrategy`, see `meshes.make_strategy`.
        free_fields: fields and groups of the config that decide neither
            weights nor data. They may change during the life of a run.
    """

    config: ml_collections.ConfigDict
    strategy: MeshStrategy | None = None

    free_fields = (
        "mesh",
        "train.keep_checkpoints",
        "train.log_every",
        "train.steps",
    )

    def __post_init__(self):
        self.check_config()

    @abc.abstractmethod
    def check_config(self) -> None:
        """Refuses a config that cannot be used, before any work is done."""

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.strategy is None or self.strategy.is_first

    def scope(self) -> contextlib.AbstractContextManager:
        """Returns the context in which model and optimizer are made."""
        if self.strategy is None:
            return contextlib.nullcontext()
        return self.strategy.scope()

    def make_optimizer(
        self,
        schedule: keras.optimizers.schedules.LearningRateSchedule,
        **settings,
    ) -> keras.optimizers.Optimizer:
        """Makes the optimizer that `config.train` names."""
        return optimizer.make_optimizer(self.config.train, schedule, **settings)

    def shard(self, dataset: tf.data.Dataset) -> tf.data.Dataset:
        """Puts the batches of a dataset, read by every process, on the mesh."""
        if self.strategy is None:
            return dataset
        return self.strategy.shard_batches(dataset)

    @abc.abstractmethod
    def dry_run_report(self) -> str:
        """Returns what the run holds and costs; allocates nothing."""

    @abc.abstractmethod
    def prepare(self, workdir: str) -> Any:
        """Reads the text once and makes its vocabulary, unless done."""

    @abc.abstractmethod
    def data_report(self, prepared: Any) -> list[str]:
        """Returns lines on the size of the text."""

    @abc.abstractmethod
    def build(self, prepared: Any) -> keras.Model:
        """Builds the compiled model; the seed decides its weights."""

    @abc.abstractmethod
    def batches(
        self, prepared: Any, split: str, start_step: int = 0
    ) -> tf.data.Dataset:
        """Returns the batches of a split, for training from `start_step`."""

    @abc.abstractmethod
    def num_batches(self, prepared: Any, split: str) -> int:
        """Returns the number of batches in one pass over a split."""

    def callbacks(
        self, prepared: Any, board: TrainingBoard
    ) -> list[keras.callbacks.Callback]:
        """Returns the task's own callbacks, for the first process.

        Args:
            prepared: the result of `prepare`.
            board: `TrainingBoard` of the run.
        """
        del prepared, board
        return []

    @abc.abstractmethod
    def evaluate(
        self,
        scorer: keras.Model,
        prepared: Any,
        split: str,
        clipped: bool = False,
    ) -> list[str]:
        """Returns lines on the model's quality on a split.

        Args:
            clipped: whether experts drop tokens as in training, see
                `moe_tf.layers.clipped_evaluation`.
        """

    @abc.abstractmethod
    def example_outputs(self, scorer: keras.Model, prepared: Any) -> list[str]:
        """Returns lines of text that the trained model writes."""
