"""What devices say to each other in the programs that DTensor makes."""

import math
import typing

import tensorflow as tf
from tensorflow.python.eager import context


class Collective(typing.NamedTuple):
    """One op of the program of one device.

    `kind` is `all-to-all`, `all-gather`, `all-reduce` or another, `shape`
    that of what the op gives on one device, `name` says what it serves,
    `dtype` is the name of what is sent.
    """

    kind: str
    shape: tuple
    bytes: int
    name: str
    dtype: str


def list_collectives(function, *args):
    """The `Collective`s of all programs that are first made by a call.

    Args:
        function: called with `args`. What it traced before is not seen.
    """
    before = set(context.context().list_function_names())
    function(*args)
    after = set(context.context().list_function_names())
    found = []
    for name in sorted(after - before):
        for node in context.context().get_function_def(name).node_def:
            if node.op.startswith("Collective"):
                found.append(_read(node))
    return found


def _read(node):
    (shape,) = node.attr["_output_shapes"].list.shape
    shape = tuple(dim.size for dim in shape.dim)
    kinds = {
        "AllToAll": "all-to-all",
        "AllGather": "all-gather",
        "AllReduce": "all-reduce",
        "AddN": "all-reduce",
    }
    text = node.op + node.name
    kind = next((kinds[key] for key in kinds if key in text), node.op)
    dtype = tf.dtypes.as_dtype(node.attr["T"].type)
    size = dtype.size * math.prod(shape)
    return Collective(kind, shape, size, node.name, dtype.name)
