"""Batches of a `tf.data.Dataset`, placed on a mesh."""

import tensorflow as tf

from moe_tf.distribute import placement
from moe_tf.distribute import process_sync

_WHOLE = tf.data.experimental.AutoShardPolicy.DATA


def shard_batches(dataset):
    """See `MeshStrategy.shard_batches`."""
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = _WHOLE
    return dataset.with_options(options)


class MeshDataset:
    """A dataset whose batches lie on the mesh, sharded over `batch`.

    Not a `tf.data.Dataset`: its iterator would take Keras's steps through
    `tf.experimental.Optional`, which DTensor cannot lay out.

    Several processes must read as many batches, of equal shapes. A dataset
    whose `auto_shard_policy` is `DATA`, as Keras makes them of arrays, has
    batches that all processes read whole; others have this process's part.

    Args:
        dataset: `tf.data.Dataset` of batches.
        strategy: `MeshStrategy`
    """

    def __init__(self, dataset, strategy):
        self._dataset = dataset
        self._strategy = strategy
        options = dataset.options().experimental_distribute
        self._whole = options.auto_shard_policy == _WHOLE
        self.element_spec = dataset.element_spec

    def __iter__(self):
        with placement.host():
            iterator = iter(self._dataset)
        return MeshIterator(iterator, self._strategy, self._whole)

    def cardinality(self):
        return self._dataset.cardinality()


class MeshIterator:
    """Places one batch after another.

    `fit` and `evaluate` let it look ahead, so one batch more than they use may
    be drawn from the data. It lies on the devices beside the current one; that
    of data which `fit` keeps from epoch to epoch, through other work too.
    """

    def __init__(self, iterator, strategy, whole):
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
        # Not before it is asked for: who agrees to a batch takes the step.
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

    def look_ahead(self):
        """Draws and places the next batch now, while devices are at work.

        What `next` is to give or raise is kept until it is called.
        """
        if self._ahead is None:
            batch, placed = _tried(next, self._iterator, _END), None
            if batch is not _END and not isinstance(batch, Exception):
                placed = _tried(self._strategy.put_batch, batch, self._whole)
            self._ahead = batch, placed


_END = object()


def _tried(function, *args):
    """What `function` returns, or the exception that it raises."""
    try:
        return function(*args)
    except Exception as error:
        return error


def not_the_end(error, what):
    """An error to raise in place of one that Keras takes for the data's end."""
    return RuntimeError(f"{what}; this is not the end of the data: {error}")
