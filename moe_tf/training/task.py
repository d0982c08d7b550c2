"""What the loop asks of a task."""

from typing import Any
from typing import Protocol

import keras
import tensorflow as tf

from moe_tf.distribute import MeshStrategy


class Task(Protocol):
    """Brings model, data and loss together from a config.

    Attributes:
        strategy: optional `MeshStrategy`.
        free_fields: fields and groups of the config that decide neither
            weights nor data, and may differ from those of the run.
        is_first: whether this process prints and writes, for all there are.
    """

    strategy: MeshStrategy | None
    free_fields: tuple[str, ...]
    is_first: bool

    def describe(self) -> str:
        """What a run will hold and cost, before anything is allocated."""

    def prepare(self, workdir: str) -> Any:
        """The text, read once, and what turns it into ids."""

    def describe_data(self, prepared) -> list[str]:
        """What was found in the text, in lines."""

    def build(self, prepared) -> keras.Model:
        """The compiled model, with its weights as the seed makes them."""

    def batches(self, prepared, split, start_step=0) -> tf.data.Dataset:
        """Batches of a split, for training from `start_step` on."""

    def num_batches(self, prepared, split) -> int:
        """Number of batches in one pass over a split."""

    def callbacks(self, prepared, board) -> list[keras.callbacks.Callback]:
        """What the task adds, in the first process, to every trainer's.

        Args:
            prepared: as `prepare` gave it.
            board: `TrainingBoard` of the run.
        """

    def evaluate(self, scorer, prepared, split) -> list[str]:
        """How good the model is on a split, in lines."""

    def show(self, scorer, prepared) -> list[str]:
        """What the trained model writes, in lines."""
