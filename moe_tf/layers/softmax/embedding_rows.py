"""Rows of a table on a mesh."""

import tensorflow as tf
from keras import ops

from moe_tf import sharding


def replicate_ids(ids):
    """Ids of rows that every device gathers: those of all devices.

    Args:
        ids: int.

    Returns:
        int64 of the same shape: GPUs leave what is done to int32 to the host.
    """
    return sharding.constrain(ops.cast(ids, "int64"), *(None,) * len(ids.shape))


def shard_rows(x):
    """Rows that every device has gathered: from here on each keeps its own.

    Gradients go the other way: each device gets those of all rows. An update
    of the table is then a matter of each device, while summed over devices
    the gradient would be as large as the table, and by optimizers that square
    the rows apart from each other be summed twice.

    Args:
        x: float `(B, ...)`, equal on all devices.

    Returns:
        The same, laid out by `batch`; `x` itself where there is no mesh.
    """
    if sharding.axes() is None:
        return x
    rest = (None,) * (x.shape.rank - 1)

    @tf.custom_gradient
    def cut(x):
        own = sharding.constrain(x, "batch", *rest)
        return own, lambda dx: sharding.constrain(dx, None, *rest)

    return cut(x)
