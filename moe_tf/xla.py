"""What of a graph is compiled by XLA."""

import contextlib
import contextvars

import tensorflow as tf
from tensorflow.python.ops import control_flow_util

_in_one_piece = contextvars.ContextVar("in_one_piece", default=False)


def wants_static_shapes():
    """Whether this trace ends in XLA, where no shape may depend on a value.

    TensorFlow's own loops ask the same question this way; there is no public
    one. The answer is that of the trace: a `tf.function` traced outside XLA
    and called inside it later does not compile.
    """
    graph = tf.compat.v1.get_default_graph()
    return control_flow_util.GraphOrParentsInXlaContext(graph)


def runs_ops_on_gpu():
    """Whether a GPU may run this trace, op by op."""
    gpus = tf.config.list_logical_devices("GPU")
    return bool(gpus) and not wants_static_shapes()


def compiles_part(jit_compile, variable):
    """Whether a part of this trace should be a program of its own.

    Args:
        jit_compile: bool, or `"auto"` for where a GPU runs it.
        variable: `keras.Variable` that the part reads.
    """
    if tf.executing_eagerly() or wants_static_shapes() or _in_one_piece.get():
        return False
    return on_gpu(variable) if jit_compile == "auto" else jit_compile


@contextlib.contextmanager
def in_one_piece():
    """Within it no part of a trace becomes a program of its own.

    For programs whose shapes change from call to call, as a decoder's do:
    each shape would be compiled.
    """
    token = _in_one_piece.set(True)
    try:
        yield
    finally:
        _in_one_piece.reset(token)


def compiled(function):
    """`function` as one XLA program, gradients too, within a graph."""
    return tf.function(function, jit_compile=True, autograph=False)


def on_gpu(variable):
    """Whether a `keras.Variable` lives on a GPU, and so what reads it."""
    return "GPU" in getattr(variable.value, "device", "")
