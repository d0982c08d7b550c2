"""Floating-point operations of a graph, counted from its matrix products.

TensorFlow's profiler needs static shapes, and the number of rows of a dropless
layer's expert is known at run time only. So the count is computed in the
graph: `count_product_flops` adds ops that multiply the actual shapes of each
product. With static shapes they fold to a constant.
"""

import tensorflow as tf

_PRODUCTS = {
    "MatMul": "transpose_a",
    "BatchMatMul": "adj_x",
    "BatchMatMulV2": "adj_x",
    "BatchMatMulV3": "adj_x",
}
# Ops that may contain products which the graph does not show.
_OPAQUE = {"XlaCallModule", "XlaDot", "XlaDotV2", "CustomCall"}


def count_product_flops(graph: tf.Graph) -> tf.Tensor | None:
    """Counts the operations of all products in a graph that is being traced.

    Counts 2 for each multiply-add of `tf.matmul` and `tf.einsum`, and nothing
    for elementwise ops. All products of the graph count, also those that its
    result does not need.

    Args:
        graph: the default graph, a `tf.function`'s.

    Returns:
        int64 scalar tensor, or `None` if products hide in a function that
        the graph calls, or in compiled code.
    """
    operations = graph.get_operations()
    called = [
        node.op
        for function in graph.as_graph_def().library.function
        for node in function.node_def
    ]
    kinds = {operation.type for operation in operations}
    if kinds & _OPAQUE or set(called) & {*_PRODUCTS, "Einsum", *_OPAQUE}:
        return None
    total = tf.constant(0, tf.int64)
    for operation in operations:
        if operation.type in _PRODUCTS:
            total += _of_matmul(operation)
        elif operation.type == "Einsum":
            total += _of_einsum(operation)
    return total


def _of_matmul(operation):
    transposed = operation.get_attr(_PRODUCTS[operation.type])
    summed = _shape(operation.inputs[0])[-2 if transposed else -1]
    return 2 * summed * tf.reduce_prod(_shape(operation.outputs[0]))


def _of_einsum(operation):
    equation = operation.get_attr("equation").decode()
    operands = equation.split("->")[0].split(",")
    if "..." in equation or len(operands) != 2:
        raise NotImplementedError(
            "Only einsums of two operands with a letter for each axis are "
            f"counted. Received: {equation}"
        )
    sizes = {}
    for letters, tensor in zip(operands, operation.inputs, strict=True):
        sizes.update(zip(letters, tf.unstack(_shape(tensor)), strict=True))
    return 2 * tf.reduce_prod(tf.stack(list(sizes.values())))


def _shape(tensor):
    return tf.shape(tensor, out_type=tf.int64)
