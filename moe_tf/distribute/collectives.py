"""Collective ops (all-to-all, all-reduce, ...) in DTensor's programs.

For tests and benchmarks: nothing here sends anything. Tokens are sent by
`moe_tf/dispatch/all_to_all.py`.
"""

import math
import typing
from collections.abc import Callable

import tensorflow as tf
from tensorflow.python.eager import context


class Collective(typing.NamedTuple):
    """A collective op in the program of one device.

    Attributes:
        kind: str, `"all-to-all"`, `"all-gather"`, `"all-reduce"` or another.
        shape: tuple of ints, of the op's result on one device.
        bytes: int, size of that result.
        name: str, name of the op, which contains its purpose.
        dtype: str, name of the dtype that is sent.
    """

    kind: str
    shape: tuple
    bytes: int
    name: str
    dtype: str


def list_collectives(
    function: Callable[..., object], *args: object
) -> list[Collective]:
    """Calls a function and lists the collectives of programs it compiles.

    Args:
        function: called with `args`. Programs that it compiled in earlier
            calls are not included.

    Returns:
        list of `Collective`.
    """
    before = set(context.context().list_function_names())
    function(*args)
    after = set(context.context().list_function_names())
    ops = []
    for name in sorted(after - before):
        for node in context.context().get_function_def(name).node_def:
            if node.op.startswith("Collective"):
                ops.append(_read(node))
    return ops


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
