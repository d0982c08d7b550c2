"""Whether the code being traced will be compiled by XLA."""

import tensorflow as tf
from tensorflow.python.ops import control_flow_util


def wants_static_shapes():
    """Whether this trace ends in XLA, where no shape may depend on a value.

    TensorFlow's own loops ask the same question this way; there is no public
    one. The answer is that of the trace: a `tf.function` traced outside XLA
    and called inside it later does not compile.
    """
    graph = tf.compat.v1.get_default_graph()
    return control_flow_util.GraphOrParentsInXlaContext(graph)
