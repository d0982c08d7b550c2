"""Lookup of embedding rows on a mesh."""

import tensorflow as tf
from keras import ops

from moe_tf import sharding
from moe_tf.types import Tensor


def replicate_ids(ids: Tensor) -> Tensor:
    """Replicates row ids, so that every device gathers the rows of all.

    Args:
        ids: int, of any shape.

    Returns:
        int64 of the same shape. TensorFlow's GPU kernels keep int32 operands
        in host memory, which costs a copy per operation.
    """
    return sharding.constrain(ops.cast(ids, "int64"), *(None,) * len(ids.shape))


def shard_rows(x: Tensor) -> Tensor:
    """Shards gathered table rows over `batch`.

    Each device keeps the rows of its own examples. In the gradient every
    device receives the gradients of all rows and updates the replicated table
    by itself. An all-reduce of the table's gradient would send a tensor as
    large as the table, and would give wrong squares to optimizers that square
    rows before they add duplicates.

    Args:
        x: float `(B, ...)`, replicated.

    Returns:
        `x`, sharded over `batch`; `x` itself where there is no mesh.
    """
    if sharding.axes() is None:
        return x
    rest = (None,) * (x.shape.rank - 1)

    @tf.custom_gradient
    def shard(x):
        own = sharding.constrain(x, "batch", *rest)
        return own, lambda dx: sharding.constrain(dx, None, *rest)

    return shard(x)
