"""Layout of beams: `M` hypotheses for each of `B` sentences.

Tensors of beams are `(B, M, ...)`. A model's step sees them flattened to
`N = B * M` rows: row `b * M + m` is the `m`-th hypothesis of sentence `b`.
"""

import tensorflow as tf

from moe_tf.types import Nest
from moe_tf.types import Tensor


def tile_beams(tree: Nest, num_beams: int, num_sentences: Tensor) -> Nest:
    """Repeats each sentence's row once for each beam.

    Args:
        tree: nested tensors `(B, ...)`.
        num_beams: int, `M`.
        num_sentences: int32 scalar, `B`.

    Returns:
        Nested tensors `(B * M, ...)`, copies of a row side by side.

    Raises:
        ValueError: a leaf has no axes.
        tf.errors.InvalidArgumentError: a leaf's first axis is not
            `num_sentences`.
    """

    def tile(leaf):
        leaf = tf.convert_to_tensor(leaf)
        if not leaf.shape.rank:
            raise ValueError(
                "Memory and states must be tensors whose first axis is that "
                f"of the sentences. Received: shape {leaf.shape}"
            )
        tf.debugging.assert_equal(
            tf.shape(leaf)[0],
            num_sentences,
            "Memory and states must have one row for each of `max_length_B`.",
        )
        ones = [1] * (leaf.shape.rank - 1)
        return flatten_beams(tf.tile(leaf[:, None], [1, num_beams, *ones]))

    return tf.nest.map_structure(tile, tree)


def flatten_beams(x_BM: Tensor) -> Tensor:
    """Reshapes `(B, M, ...)` to `(B * M, ...)`."""
    return tf.reshape(x_BM, [-1, *_sizes(x_BM)[2:]])


def unflatten_beams(x_N: Tensor, num_beams: int) -> Tensor:
    """Reshapes `(B * M, ...)` to `(B, M, ...)`, `M` being `num_beams`."""
    return tf.reshape(x_N, [-1, num_beams, *_sizes(x_N)[1:]])


def reorder_beams(tree: Nest, parent_BM: Tensor) -> Nest:
    """Gathers for each beam the rows of the beam that it continues.

    Args:
        tree: nested tensors `(B * M, ...)`.
        parent_BM: int32, back-pointers within each sentence.

    Returns:
        Nested tensors `(B * M, ...)`.
    """
    num_sentences, num_beams = tf.shape(parent_BM)[0], parent_BM.shape[1]
    first_B1 = tf.range(num_sentences)[:, None] * num_beams
    row_N = flatten_beams(parent_BM + first_B1)
    return tf.nest.map_structure(lambda leaf: tf.gather(leaf, row_N), tree)


def batch_free_shapes(tree: Nest) -> Nest:
    """Returns the leaves' shapes with an unknown first axis."""
    return tf.nest.map_structure(
        lambda leaf: tf.TensorShape([None, *leaf.shape[1:]]), tree
    )


def _sizes(x):
    """Sizes of the axes: ints where known."""
    dynamic = tf.shape(x)
    return [
        dynamic[axis] if size is None else size
        for axis, size in enumerate(x.shape)
    ]
