"""What the loop asks of a task."""

import abc
import contextlib
import dataclasses

import keras
import ml_collections
import tensorflow as tf

from moe_tf.distribute import MeshStrategy
from moe_tf.training import fields


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """Brings model, data and loss together from a config.

    `free_fields` are the fields and groups of the config that decide neither
    weights nor data, and may differ from those of the run.

    Attributes:
        config: the run's config. `data.rows_multiple` is set here if a mesh
            or groups need it.
        strategy: optional `MeshStrategy`, see `meshes.strategy`.
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
        self.check()

    @abc.abstractmethod
    def check(self) -> None:
        """Refuses a config that cannot be used, before any work is done."""

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes, for all there are."""
        return self.strategy is None or self.strategy.is_first

    def scope(self):
        """Where the model and its optimizer are made."""
        if self.strategy is None:
            return contextlib.nullcontext()
        return self.strategy.scope()

    def optimizer(self, schedule, **settings) -> keras.optimizers.Optimizer:
        """The optimizer that `config.train` names."""
        train = self.config.train
        return fields.OPTIMIZERS[train.optimizer](
            schedule, global_clipnorm=train.clip_norm, **settings
        )

    def shard(self, dataset: tf.data.Dataset) -> tf.data.Dataset:
        """The dataset, of which every process reads all, on the mesh."""
        if self.strategy is None:
            return dataset
        return self.strategy.shard_batches(dataset)

    @abc.abstractmethod
    def describe(self) -> str:
        """What a run will hold and cost, before anything is allocated."""

    @abc.abstractmethod
    def prepare(self, workdir: str):
        """The text, read once, and what turns it into ids."""

    @abc.abstractmethod
    def describe_data(self, prepared) -> list[str]:
        """What was found in the text, in lines."""

    @abc.abstractmethod
    def build(self, prepared) -> keras.Model:
        """The compiled model, with its weights as the seed makes them."""

    @abc.abstractmethod
    def batches(self, prepared, split, start_step=0) -> tf.data.Dataset:
        """Batches of a split, for training from `start_step` on."""

    @abc.abstractmethod
    def num_batches(self, prepared, split) -> int:
        """Number of batches in one pass over a split."""

    def callbacks(self, prepared, board) -> list[keras.callbacks.Callback]:
        """What the task adds, in the first process, to every trainer's.

        Args:
            prepared: as `prepare` gave it.
            board: `TrainingBoard` of the run.
        """
        del prepared, board
        return []

    @abc.abstractmethod
    def evaluate(self, scorer, prepared, split, clipped=False) -> list[str]:
        """How good the model is on a split, in lines.

        Args:
            clipped: bool, whether experts drop meanwhile, as in training.
        """

    @abc.abstractmethod
    def show(self, scorer, prepared) -> list[str]:
        """What the trained model writes, in lines."""
