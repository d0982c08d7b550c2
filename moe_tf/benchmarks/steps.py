"""What is timed: training steps, and the two limits of the machine."""

import tensorflow as tf

from moe_tf import layers
from moe_tf.benchmarks import flops


class TrainStep:
    """A compiled forward and backward pass of a layer over fixed rows.

    The layer's own losses are part of it; the gradient of the outputs is
    given, so that no loss over them is. A call returns the outputs and the
    gradients of inputs and weights, whole: what a function returns is
    computed, and what nothing asks for is dropped, also where only a control
    dependency remains.

    Args:
        layer: a Keras layer of float `(T, D)`. It is built here.
        num_rows: int, `T`.
        width: int, `D`.
        jit_compile: bool, whether XLA compiles the step.
    """

    def __init__(self, layer, num_rows, width, jit_compile=False):
        self.layer = layer
        shape = (num_rows, width)
        layer.build(shape)
        self._jit_compile = jit_compile
        self._arguments = [
            normal(shape, layer.compute_dtype, seed) for seed in (1, 2)
        ]
        self._step = self._traced(self._forward_backward)

    def __call__(self):
        return self._step(*self._arguments)

    def flops(self):
        """`flops.of_products` of the step's graph: an int, or `None`."""

        def count(x_TD, dy_TD):
            self._forward_backward(x_TD, dy_TD)
            return flops.of_products(tf.compat.v1.get_default_graph())

        total = self._traced(count)(*self._arguments)
        return None if total is None else int(total)

    def dropped(self):
        """Fraction of assignments dropped so far; `None` of a dense layer."""
        if not isinstance(self.layer, layers.SparseMoE):
            return None
        return float(self.layer.balance.statistics()["dropped_fraction"])

    def _traced(self, function):
        compiled = tf.function(
            function, jit_compile=self._jit_compile, autograph=False
        )
        return compiled.get_concrete_function(*self._arguments)

    def _forward_backward(self, x_TD, dy_TD):
        with tf.GradientTape() as tape:
            tape.watch(x_TD)
            y_TD = self.layer(x_TD, training=True)
            losses = list(self.layer.losses)
        gradients = tape.gradient(
            [y_TD, *losses],
            [x_TD, *[v.value for v in self.layer.trainable_variables]],
            output_gradients=[dy_TD, *map(tf.ones_like, losses)],
        )
        # The gradient of a gather is sparse until it is asked to be a tensor.
        return [y_TD, *map(tf.convert_to_tensor, gradients)]


def ceiling(size, dtype, jit_compile=False):
    """A function that multiplies two matrices of `(size, size)`."""
    product = tf.function(tf.matmul, jit_compile=jit_compile, autograph=False)
    a, b = (normal((size, size), dtype, seed) for seed in (1, 2))
    return lambda: [product(a, b)]


def traffic(num_bytes):
    """A function that reads two float32 arrays and writes one over.

    The arrays take `num_bytes` each, so a call moves three times as many: what
    a training step does to weights, read forward, read backward, gradient
    written. It uses all threads and allocates nothing.
    """
    total = tf.Variable(tf.zeros(num_bytes // 4))
    addend = tf.ones_like(total)
    return lambda: [total.assign_add(addend).read_value()[:1]]


def normal(shape, dtype, seed):
    return tf.cast(tf.random.stateless_normal(shape, seed=(seed, 0)), dtype)
