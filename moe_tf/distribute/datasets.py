"""Batches of a `tf.data.Dataset`, placed on a mesh."""

import functools

import tensorflow as tf

from moe_tf.distribute import peers
from moe_tf.distribute import placement

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
    be drawn from the data, and lies on the devices beside the current one.
    """

    def __init__(self, iterator, strategy, whole):
        self._iterator = iterator
        self._strategy = strategy
        self._whole = whole
        self._drawn = 0
        self._ahead = None

    def __iter__(self):
        return self

    def __next__(self):
        self.look_ahead()
        (draw, place), self._ahead = self._ahead, None
        try:
            batch = draw()
        except StopIteration:
            peers.agree("the end of the data after {} batches", self._drawn)
            raise
        self._drawn += 1
        # Not before it is asked for: who agrees to a batch takes the step.
        if self._strategy.num_processes > 1:
            describe = peers.digest if self._whole else peers.describe
            peers.agree("batch {}", self._drawn, describe(batch))
        try:
            return place()
        except tf.errors.OutOfRangeError as error:
            raise not_the_end(error, "A batch could not be placed") from error

    def look_ahead(self):
        """Draws and places the next batch now, while devices are at work.

        What `next` is to give or raise is kept until it is called.
        """
        if self._ahead is None:
            draw = _outcome(lambda: next(self._iterator))
            put_batch = self._strategy.put_batch
            place = _outcome(lambda: put_batch(draw(), self._whole))
            self._ahead = draw, place


def _outcome(function):
    """A function that returns or raises what `function` does now."""
    try:
        result = function()
    except Exception as error:
        return functools.partial(_throw, error)
    return lambda: result


def _throw(error):
    raise error


def not_the_end(error, what):
    """An error to raise in place of one that Keras takes for the data's end."""
    return RuntimeError(f"{what}; this is not the end of the data: {error}")
