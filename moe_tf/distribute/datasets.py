"""Batches of a `tf.data.Dataset`, placed on a mesh."""

import tensorflow as tf

from moe_tf.distribute import placement


class MeshDataset:
    """A dataset whose batches lie on the mesh, sharded over `batch`.

    Not a `tf.data.Dataset`: its iterator would take Keras's steps through
    `tf.experimental.Optional`, which DTensor cannot lay out.

    Args:
        dataset: `tf.data.Dataset` of batches.
        strategy: `MeshStrategy`
    """

    def __init__(self, dataset, strategy):
        self._dataset = dataset
        self._strategy = strategy
        self.element_spec = dataset.element_spec

    def __iter__(self):
        with placement.host():
            return MeshIterator(iter(self._dataset), self._strategy)

    def cardinality(self):
        return self._dataset.cardinality()


class MeshIterator:
    """Places one batch after another."""

    def __init__(self, iterator, strategy):
        self._iterator = iterator
        self._strategy = strategy

    def __iter__(self):
        return self

    def __next__(self):
        batch = next(self._iterator)
        try:
            return self._strategy.put_batch(batch)
        except tf.errors.OutOfRangeError as error:
            raise not_the_end(error, "A batch could not be placed") from error


def not_the_end(error, what):
    """An error to raise in place of one that Keras takes for the data's end."""
    return RuntimeError(f"{what}; this is not the end of the data: {error}")
