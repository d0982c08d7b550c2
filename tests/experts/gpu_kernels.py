"""What a program would move between a GPU and the memory of its host.

TensorFlow's kernels for GPUs are registered in every build. Many of those for
int32 want operands in the memory of the host, and compute there.
"""

import functools
import math
import typing

import tensorflow as tf
from tensorflow.python.eager import context
from tensorflow.python.framework import kernels
from tensorflow.python.framework import op_def_registry

# They call other functions, or hand on what they are given.
_HANDED_ON = {
    *("PartitionedCall", "StatefulPartitionedCall", "StatelessWhile", "While"),
    *("If", "StatelessIf", "Identity", "IdentityN", "Reshape", "ExpandDims"),
    *("Squeeze", "StopGradient", "PreventGradient", "Shape", "Const"),
    *("NoOp", "Placeholder"),
}


class OnHost(typing.NamedTuple):
    """A tensor that an op reads or writes in the memory of the host."""

    bytes: int
    op: str
    dtype: str
    shape: tuple
    name: str


def on_host(function, *args):
    """Tensors on the host in all programs that are first made by a call.

    Args:
        function: called with `args`, on a mesh: only its programs tell shapes.
            Programs that end with it are not seen, so it may return them.

    Returns:
        List of `OnHost`, the largest first.
    """
    before = set(context.context().list_function_names())
    kept = function(*args)
    after = set(context.context().list_function_names())
    found = set()
    for name in after - before:
        found |= set(_of_function(context.context().get_function_def(name)))
    del kept
    return sorted(found, reverse=True)


def on_host_in(graph):
    """The same of a `tf.Graph` whose shapes are known."""
    found = set()
    for op in graph.get_operations():
        tensors = [*op.inputs, *op.outputs]
        shapes = [tuple(tensor.shape.as_list()) for tensor in tensors]
        found |= set(_of_node(op.node_def, shapes))
    return sorted(found, reverse=True)


def _of_function(definition):
    nodes = {node.name: node for node in definition.node_def}
    for node in nodes.values():
        if "_output_shapes" in node.attr:
            inputs = [name for name in node.input if not name.startswith("^")]
            yield from _of_node(
                node,
                [
                    *(_shape_of(name, nodes) for name in inputs),
                    *map(_sizes, node.attr["_output_shapes"].list.shape),
                ],
            )


def _of_node(node, shapes):
    if node.op in _HANDED_ON:
        return
    op, kernel = op_def_registry.get(node.op), _kernel(node)
    tensors = _arguments(node, op.input_arg) + _arguments(node, op.output_arg)
    for (name, dtype), shape in zip(tensors, shapes, strict=True):
        if shape is None or dtype in ("resource", "variant", "string"):
            continue
        if kernel is None or name in kernel.host_memory_arg:
            size = tf.as_dtype(dtype).size * math.prod(shape)
            yield OnHost(size, node.op, dtype, shape, node.name)


@functools.cache
def _registered(op):
    found = kernels.get_registered_kernels_for_op(op).kernel
    found = [k for k in found if k.device_type in ("GPU", "DEFAULT")]
    return sorted(found, key=lambda kernel: kernel.device_type != "GPU")


def _kernel(node):
    """The kernel that a GPU has for the node; None if it has none."""
    for kernel in _registered(node.op):
        if all(
            node.attr[constraint.name].type
            in constraint.allowed_values.list.type
            for constraint in kernel.constraint
        ):
            return kernel
    return None


def _arguments(node, arguments):
    """Name and dtype of each, those of a list one by one."""
    found = []
    for arg in arguments:
        if arg.type_list_attr:
            types = node.attr[arg.type_list_attr].list.type
        else:
            one = node.attr[arg.type_attr].type if arg.type_attr else arg.type
            number = node.attr[arg.number_attr].i if arg.number_attr else 1
            types = [one] * number
        found += [(arg.name, tf.as_dtype(dtype).name) for dtype in types]
    return found


def _shape_of(name, nodes):
    """Of what an input names; None for an argument of the function."""
    node, _, place = name.partition(":")
    if node not in nodes or "_output_shapes" not in nodes[node].attr:
        return None
    argument, _, index = place.partition(":")
    names = [
        name
        for name, _ in _arguments(
            nodes[node], op_def_registry.get(nodes[node].op).output_arg
        )
    ]
    first = names.index(argument)
    return _sizes(
        nodes[node].attr["_output_shapes"].list.shape[first + int(index)]
    )


def _sizes(shape):
    sizes = tuple(dim.size for dim in shape.dim)
    return None if shape.unknown_rank or -1 in sizes else sizes
