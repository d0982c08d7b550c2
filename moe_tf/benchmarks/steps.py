"""Timed functions: training steps, a large product, memory traffic."""

from collections.abc import Callable
from collections.abc import Sequence

import keras
import tensorflow as tf

from moe_tf import layers
from moe_tf.benchmarks import flops


class TrainStep:
    """Compiled forward and backward pass of a layer over fixed rows.

    The layer's own losses are part of the step. The gradient of the outputs
    is an input, so there is no loss over the outputs. A call returns the
    outputs and the gradients of inputs and weights, all of them entirely:
    TensorFlow drops whatever a function does not return.

    Args:
        layer: a Keras layer of float `(T, D)`, built by this constructor.
        num_rows: int, `T`.
        width: int, `D`.
        jit_compile: bool, whether XLA compiles the step.
    """

    def __init__(
        self,
        layer: keras.layers.Layer,
        num_rows: int,
        width: int,
        jit_compile: bool = False,
    ):
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

    def flops(self) -> int | None:
        """Operations of the step's products; None if some are hidden."""

        def count(x_TD, dy_TD):
            self._forward_backward(x_TD, dy_TD)
            return flops.count_product_flops(tf.compat.v1.get_default_graph())

        total = self._traced(count)(*self._arguments)
        return None if total is None else int(total)

    def dropped(self) -> float | None:
        """Fraction of assignments dropped so far; None for a dense layer."""
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
        # The gradient of a gather is sparse until it is converted.
        return [y_TD, *map(tf.convert_to_tensor, gradients)]


def ceiling(
    size: int, dtype: str, jit_compile: bool = False
) -> Callable[[], list[tf.Tensor]]:
    """Makes a function that multiplies two matrices of `(size, size)`."""
    product = tf.function(tf.matmul, jit_compile=jit_compile, autograph=False)
    a, b = (normal((size, size), dtype, seed) for seed in (1, 2))
    return lambda: [product(a, b)]


def traffic(num_bytes: int) -> Callable[[], list[tf.Tensor]]:
    """Makes a function that reads two float32 arrays and overwrites one.

    Each array takes `num_bytes`, so a call moves `3 * num_bytes`, as a
    training step does for weights: read forward, read backward, gradient
    written. The function uses all threads and allocates nothing.
    """
    total = tf.Variable(tf.zeros(num_bytes // 4))
    addend = tf.ones_like(total)
    return lambda: [total.assign_add(addend).read_value()[:1]]


def normal(shape: Sequence[int], dtype: str, seed: int) -> tf.Tensor:
    """Draws a fixed standard normal tensor."""
    return tf.cast(tf.random.stateless_normal(shape, seed=(seed, 0)), dtype)
