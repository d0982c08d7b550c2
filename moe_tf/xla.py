"""XLA: whether it compiles a graph, and programs of their own within one."""

import contextlib
import contextvars
from collections.abc import Callable
from collections.abc import Iterator

import keras
import tensorflow as tf
from keras import ops
from tensorflow.python.ops import control_flow_util

from moe_tf.types import Tensor

_in_one_piece = contextvars.ContextVar("in_one_piece", default=False)


def wants_static_shapes() -> bool:
    """Returns whether XLA compiles this trace.

    In such a trace no shape may depend on a value. TensorFlow's own loops use
    the same private function; there is no public one. The answer is that of
    the trace: a `tf.function` traced outside XLA and called inside XLA later
    does not compile.
    """
    graph = tf.compat.v1.get_default_graph()
    return control_flow_util.GraphOrParentsInXlaContext(graph)


def runs_ops_on_gpu() -> bool:
    """Returns whether a GPU may run this trace op by op, outside XLA."""
    gpus = tf.config.list_logical_devices("GPU")
    return bool(gpus) and not wants_static_shapes()


def as_index(ids: Tensor) -> Tensor:
    """Casts ids to the integer type in which index tables are computed.

    int64 where a GPU may run the graph op by op, otherwise unchanged:
    TensorFlow's GPU kernels keep int32 operands in host memory, so int32
    tables would synchronise host and GPU at every op.
    """
    return ops.cast(ids, "int64") if runs_ops_on_gpu() else ids


def compiles_part(jit_compile: bool | str, variable: keras.Variable) -> bool:
    """Returns whether a part of this trace should be a program of its own.

    Args:
        jit_compile: bool, or `"auto"`: True on a GPU.
        variable: a variable that the part reads.
    """
    if tf.executing_eagerly() or wants_static_shapes() or _in_one_piece.get():
        return False
    return on_gpu(variable) if jit_compile == "auto" else jit_compile


@contextlib.contextmanager
def in_one_piece() -> Iterator[None]:
    """Context in which `compiles_part` returns False.

    For programs whose shapes change from call to call, such as a decoder's:
    XLA would compile a part again for each shape.
    """
    token = _in_one_piece.set(True)
    try:
        yield
    finally:
        _in_one_piece.reset(token)


def compiled(function: Callable) -> Callable:
    """Returns `function` as one XLA program in a graph, with its gradients."""
    return tf.function(function, jit_compile=True, autograph=False)


def on_gpu(variable: keras.Variable) -> bool:
    """Returns whether a variable, and so the ops that read it, is on a GPU."""
    return "GPU" in getattr(variable.value, "device", "")
