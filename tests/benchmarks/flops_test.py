import numpy as np
import pytest
import tensorflow as tf

from moe_tf.benchmarks import flops


def counted(function, *arguments, **kwargs):
    """What `function` costs, the count traced into its own graph."""

    def count(*arguments):
        function(*arguments)
        return flops.count_product_flops(tf.compat.v1.get_default_graph())

    total = tf.function(count, autograph=False, **kwargs)(*arguments)
    return None if total is None else int(total)


def ones(*shape):
    return tf.ones(shape)


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize(
    "product",
    [
        lambda: tf.matmul(ones(3, 5), ones(5, 7)),
        lambda: tf.matmul(ones(5, 3), ones(5, 7), transpose_a=True),
        lambda: tf.matmul(ones(3, 5), ones(7, 5), transpose_b=True),
        lambda: tf.einsum("ab,bc->ca", ones(3, 5), ones(5, 7)),
        lambda: tf.einsum("ab,bc->", ones(3, 5), ones(5, 7)),
    ],
)
def test_a_product_counts_two_for_each_multiply_add(product, jit_compile):
    assert counted(product, jit_compile=jit_compile) == 2 * 3 * 5 * 7


@pytest.mark.parametrize(
    "product",
    [
        lambda: tf.matmul(ones(4, 3, 5), ones(4, 5, 7)),
        lambda: tf.matmul(ones(4, 5, 3), ones(4, 5, 7), transpose_a=True),
        lambda: tf.matmul(ones(4, 3, 5), ones(4, 7, 5), transpose_b=True),
        lambda: tf.matmul(ones(1, 3, 5), ones(4, 5, 7)),  # broadcast
        lambda: tf.einsum("ab,xbc->xac", ones(3, 5), ones(4, 5, 7)),
        lambda: tf.einsum("xab,xbc->ac", ones(4, 3, 5), ones(4, 5, 7)),
    ],
)
def test_a_batch_counts_each_of_its_products(product):
    assert counted(product) == 4 * 2 * 3 * 5 * 7


def test_rows_known_only_while_running_are_counted_as_they_are():
    def product(x):
        few = tf.boolean_mask(x, x[:, 0] > 0)
        assert few.shape[0] is None
        return tf.matmul(few, ones(5, 7))

    x = np.full((9, 5), -1.0, np.float32)
    x[[1, 4, 6]] = 1.0
    assert counted(product, x) == 2 * 3 * 5 * 7


def test_a_gradient_adds_its_own_products():
    def products(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.matmul(x, ones(5, 7))
        return tape.gradient(y, x)

    assert counted(products, ones(3, 5)) == 2 * (2 * 3 * 5 * 7)


def test_a_graph_without_a_product_costs_nothing():
    assert counted(lambda: tf.nn.relu(ones(3, 5)) + 1.0) == 0


def test_a_product_that_a_called_function_hides_makes_the_count_unknown():
    def branch(x):
        return tf.cond(
            tf.reduce_sum(x) > 0, lambda: tf.matmul(x, ones(5, 7)), lambda: x
        )

    assert counted(branch, ones(3, 5)) is None


def test_a_function_without_products_does_not():
    def branch(x):
        tf.cond(tf.reduce_sum(x) > 0, lambda: x + 1.0, lambda: x)
        return tf.matmul(x, ones(5, 7))

    assert counted(branch, ones(3, 5)) == 2 * 3 * 5 * 7


def test_an_einsum_that_cannot_be_read_is_refused():
    with pytest.raises(NotImplementedError, match=r"Received: \.\.\."):
        counted(lambda: tf.einsum("...a,ab->...b", ones(3, 5), ones(5, 7)))
