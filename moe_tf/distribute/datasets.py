"""Batches of a `tf.data.Dataset`, placed on a mesh."""

from collections.abc import Iterator

import tensorflow as tf

from moe_tf.distribute import placement
from moe_tf.distribute import process_sync
from moe_tf.types import Nest

_WHOLE = tf.data.experimental.AutoShardPolicy.DATA


def shard_batches(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Marks a dataset whose batches every process reads whole.

    See `MeshStrategy.shard_batches`.
    """
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = _WHOLE
    return dataset.with_options(options)


class MeshDataset:
    """Dataset whose batches lie on the mesh, sharded over `batch`.

    Not a `tf.data.Dataset`: Keras's steps would then pass batches through
    `tf.experimental.Optional`, which DTensor cannot lay out.

    All processes must read equally many batches, of equal shapes. If the
    dataset's `auto_shard_policy` is `DATA`, as in the datasets that Keras
    makes of arrays, every process reads the whole batch. Otherwise a process
    reads its own part of each batch.

    Args:
        dataset: `tf.data.Dataset` of batches.
        strategy: `MeshStrategy`
    """

    def __init__(
        self, dataset: tf.data.Dataset, strategy: tf.distribute.Strategy
    ):
        self._dataset = dataset
        self._strategy = strategy
        options = dataset.options().experimental_distribute
        self._whole = options.auto_shard_policy == _WHOLE
        self.element_spec = dataset.element_spec

    def __iter__(self):
        with placement.host():
            iterator = iter(self._dataset)
        return MeshIterator(iterator, self._strategy, self._whole)

    def cardinality(self) -> tf.Tensor:
        return self._dataset.cardinality()


class MeshIterator:
    """Iterator that places batches on the mesh, one batch ahead.

    `fit` and `evaluate` call `look_ahead` during a step, so one batch more
    than they use may be drawn from the data. That batch takes memory of the
    devices beside the current one. `fit` with `steps_per_epoch` keeps its
    iterator, and the batch, between epochs.

    Args:
        iterator: iterator of batches on the host.
        strategy: `MeshStrategy`
        whole: bool, whether each process reads the whole batch.
    """

    def __init__(
        self,
        iterator: Iterator[Nest],
        strategy: tf.distribute.Strategy,
        whole: bool,
    ):
        self._iterator = iterator
        self._strategy = strategy
        self._whole = whole
        self._given = 0
        self._ahead = None

    def __iter__(self):
        return self

    def __next__(self):
        self.look_ahead()
        (batch, placed), self._ahead = self._ahead, None
        if batch is _END:
            process_sync.agree(
                "the end of the data after {} batches", self._given
            )
            raise StopIteration
        if isinstance(batch, Exception):
            raise batch
        self._given += 1
        # Not in `look_ahead`: a process that agrees to a batch must take the
        # step with it.
        if self._strategy.num_processes > 1:
            describe = (
                process_sync.checksum
                if self._whole
                else process_sync.describe_shapes
            )
            process_sync.agree("batch {}", self._given, describe(batch))
        if isinstance(placed, tf.errors.OutOfRangeError):
            what = "A batch could not be placed"
            raise not_the_end(placed, what) from placed
        if isinstance(placed, Exception):
            raise placed
        return placed

    def look_ahead(self) -> None:
        """Draws and places the next batch now, while devices are at work.

        The batch, or the error that it raised, is kept for `next`.
        """
        if self._ahead is None:
            batch, placed = _tried(next, self._iterator, _END), None
            if batch is not _END and not isinstance(batch, Exception):
                placed = _tried(self._strategy.put_batch, batch, self._whole)
            self._ahead = batch, placed


_END = object()


def _tried(function, *args):
    """Returns the function's result, or the exception that it raises."""
    try:
        return function(*args)
    except Exception as error:
        return error


def not_the_end(error: Exception, what: str) -> RuntimeError:
    """Replaces an error that Keras would take for the end of the data."""
    return RuntimeError(f"{what}; this is not the end of the data: {error}")
