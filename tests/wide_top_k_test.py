import hypothesis
import numpy as np
import tensorflow as tf
from hypothesis import strategies as st

from moe_tf import wide_top_k


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(
    size=st.integers(1, 900),
    k=st.integers(1, 9),
    levels=st.sampled_from([1, 2, 5, 10**6]),
    infinite=st.sampled_from([0.0, 0.5, 0.999, 1.0]),
    seed=st.integers(0, 99),
)
def test_is_top_k_ties_and_infinities_included(size, k, levels, infinite, seed):
    rng = np.random.default_rng(seed)
    x_NV = rng.integers(0, levels, (4, size)).astype("float32")
    x_NV[rng.random(x_NV.shape) < infinite] = -np.inf
    k = min(k, size)
    got = wide_top_k.wide_top_k(tf.constant(x_NV), k)
    order_NV = np.argsort(-x_NV, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(got[1], order_NV)
    np.testing.assert_array_equal(
        got[0], np.take_along_axis(x_NV, order_NV, axis=1)
    )


def test_a_row_with_nan_has_indices_and_leaves_the_others_alone():
    x_NV = np.random.default_rng(0).normal(size=(3, 1000)).astype("float32")
    want = tf.math.top_k(x_NV, 4)
    for bad in (x_NV[1] * np.nan, np.where(x_NV[1] > 0, np.nan, x_NV[1])):
        broken_NV = np.stack([x_NV[0], bad, x_NV[2]])
        value_NK, index_NK = wide_top_k.wide_top_k(tf.constant(broken_NV), 4)
        assert np.all((0 <= index_NK.numpy()) & (index_NK.numpy() < 1000))
        for row in (0, 2):
            np.testing.assert_array_equal(index_NK[row], want.indices[row])
            np.testing.assert_array_equal(value_NK[row], want.values[row])


def test_any_number_of_rows_in_a_graph():
    @tf.function(input_signature=[tf.TensorSpec([None, 500], tf.float32)])
    def run(x_NV):
        return wide_top_k.wide_top_k(x_NV, 3)

    for rows in (0, 2):
        value_NK, index_NK = run(np.ones((rows, 500), "float32"))
        assert value_NK.shape == (rows, 3)
        assert index_NK.numpy().tolist() == [[0, 1, 2]] * rows
