"""The gradients of a layer in training against finite differences."""

import numpy as np
import pytest
import tensorflow as tf


def check(layer, x_TD, mask_T=None, jit_compile=False, leave_out=()):
    """Asserts the derivatives along random directions; returns the gradients.

    The loss is a square loss and the layer's own losses together, so that a
    loss without a gradient to the gate would show. The same noise is drawn
    each time.

    Args:
        layer: float64 `SparseMoE`, built.
        x_TD: float array.
        mask_T: optional bool array.
        jit_compile: bool, whether XLA compiles the step.
        leave_out: names of weights whose gradients are not looked at.
    """
    target_TD = np.random.default_rng(1).normal(size=x_TD.shape)
    x_TD = tf.Variable(x_TD)
    variables = [x_TD] + [
        variable.value
        for variable in layer.trainable_variables
        if variable.name not in leave_out
    ]
    seed = getattr(layer.router, "seed_generator", None)
    state = None if seed is None else np.asarray(seed.state)

    @tf.function(jit_compile=jit_compile)
    def loss_and_gradients():
        with tf.GradientTape() as tape:
            y_TD = layer(x_TD, mask=mask_T, training=True)
            loss = tf.reduce_sum(tf.square(y_TD - target_TD))
            loss += sum(layer.losses)
        gradients = tape.gradient(loss, variables)
        return loss, [tf.convert_to_tensor(g) for g in gradients]

    def evaluate():
        if seed is not None:
            seed.state.assign(state)
        return loss_and_gradients()

    gradients = evaluate()[1]
    rng, step = np.random.default_rng(2), 1e-6
    for variable, gradient in zip(variables, gradients, strict=True):
        for _ in range(3):
            along = rng.normal(size=variable.shape)
            here = variable.numpy()
            ends = []
            for sign in (1, -1):
                variable.assign(here + sign * step * along)
                ends.append(float(evaluate()[0]))
            variable.assign(here)
            want = (ends[0] - ends[1]) / (2 * step)
            slope = float(tf.reduce_sum(gradient * along))
            assert slope == pytest.approx(want, rel=1e-5, abs=1e-6)
    return gradients
