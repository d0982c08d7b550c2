"""What must not matter to the two-level layer: order, names, the batch."""

import hypothesis
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies as st

from tests import every_router
from tests import sets

few = hypothesis.settings(max_examples=5, deadline=None)
GROUPS, GROUP_SIZE = every_router.SETTINGS["hierarchical"]["branching"]


def run(layer, x_TD, training):
    """Output, losses, the gradient of the input, load and importance."""
    layer.balance.reset_state()
    x_TD = tf.constant(x_TD)
    with tf.GradientTape() as tape:
        tape.watch(x_TD)
        y_TD = layer(x_TD, training=training)
        total = tf.reduce_sum(tf.sin(y_TD)) + sum(layer.losses)
    gradient_TD = tape.gradient(total, x_TD)
    vectors = [np.asarray(vector) for vector in layer.balance.vectors]
    return y_TD.numpy(), float(total), gradient_TD.numpy(), vectors


@pytest.mark.parametrize("training", [sets.thorough(False), True])
@few
@hypothesis.given(st.data())
def test_the_order_of_tokens_does_not_matter(training, data):
    layer = every_router.layer("hierarchical", quiet=True)
    x_TD = every_router.tokens(7, seed=data.draw(st.integers(0, 99)))
    order = data.draw(st.permutations(range(7)))
    y_TD, total, gradient_TD, vectors = run(layer, x_TD, training)
    got = run(layer, x_TD[order], training)
    np.testing.assert_allclose(got[0], y_TD[order], atol=1e-9)
    assert got[1] == pytest.approx(total)
    np.testing.assert_allclose(got[2], gradient_TD[order], atol=1e-9)
    for got_E, want_E in zip(got[3], vectors, strict=True):
        np.testing.assert_allclose(got_E, want_E, rtol=1e-5)


@pytest.mark.parametrize("training", [sets.thorough(False), True])
@few
@hypothesis.given(st.data())
def test_the_names_of_groups_and_experts_do_not_matter(training, data):
    layer = every_router.layer("hierarchical", quiet=True)
    x_TD = every_router.tokens(7, seed=data.draw(st.integers(0, 99)))
    groups = list(data.draw(st.permutations(range(GROUPS))))
    within = list(data.draw(st.permutations(range(GROUP_SIZE))))
    y_TD, total, gradient_TD, vectors = run(layer, x_TD, training)
    order = [group * GROUP_SIZE + j for group in groups for j in within]
    for variable in layer.trainable_variables:
        value = variable.numpy()
        if "primary" in variable.name:
            value = value[:, groups]
        elif "secondary" in variable.name:
            value = value[groups][:, :, within]
        else:
            value = value[order]
        variable.assign(value)
    got = run(layer, x_TD, training)
    np.testing.assert_allclose(got[0], y_TD, atol=1e-9)
    assert got[1] == pytest.approx(total)
    np.testing.assert_allclose(got[2], gradient_TD, atol=1e-9)
    for got_E, want_E in zip(got[3], vectors, strict=True):
        np.testing.assert_allclose(got_E, want_E[order], rtol=1e-5)
