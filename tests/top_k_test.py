import hypothesis
import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies as st

from moe_tf import layers
from moe_tf import top_k
from moe_tf.distribute import MeshStrategy
from moe_tf.distribute import collectives
from moe_tf.routing import gating
from tests import process


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(
    size=st.one_of(st.integers(1, 40), st.integers(300, 400)),
    k=st.integers(1, 9),
    dtype=st.sampled_from(["float32", "float64", "bfloat16"]),
    levels=st.sampled_from([1, 2, 5, 200]),
    infinite=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_the_search_on_a_gpu_is_top_k_ties_and_infinities_included(
    size, k, dtype, levels, infinite, seed
):
    rng = np.random.default_rng(seed)
    x_NV = rng.integers(0, levels, (4, size)).astype("float32")
    signs = rng.choice([-1, 1], x_NV.shape)
    x_NV[rng.random(x_NV.shape) < infinite] = np.inf
    x_NV *= signs
    k = min(k, size)
    got_NK = top_k.gpu_top_k_indices(tf.cast(x_NV, dtype), k)
    want_NK = np.argsort(-x_NV, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(got_NK, want_NK)


def test_indices_of_rows_with_nan_are_distinct_and_nan_comes_first():
    x_NV = np.array([[np.nan] * 4, [1, np.nan, -np.inf, 2], [1, 2, 3, 4]])
    want_NK = [[0, 1, 2, 3], [1, 3, 0, 2], [3, 2, 1, 0]]
    np.testing.assert_array_equal(top_k.gpu_top_k_indices(x_NV, 4), want_NK)
    padded_NV = np.pad(x_NV, [[0, 0], [0, 500]], constant_values=-np.inf)
    np.testing.assert_array_equal(
        top_k.gpu_top_k_indices(padded_NV, 4), want_NK
    )


def test_pays_for_rows_that_a_gpu_would_sort_and_not_inside_xla(monkeypatch):
    assert not top_k.gpu_search_pays(16)  # No GPU in tests.
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: [kind])
    assert top_k.gpu_search_pays(16)
    assert top_k.gpu_search_pays(1000)
    assert not top_k.gpu_search_pays(1001)
    found = []

    @tf.function(jit_compile=True)
    def compiled():
        found.append(top_k.gpu_search_pays(16))
        return 0

    compiled()
    assert found == [False]


@pytest.mark.parametrize("num_experts,k", [(2, 1), (6, 2), (5, 5)])
def test_gates_and_gradients_are_those_of_top_k(num_experts, k, monkeypatch):
    rng = np.random.default_rng(0)
    clean_TE, draw_TE = (
        tf.constant(rng.normal(size=(7, num_experts))) for _ in range(2)
    )
    std_TE = tf.ones_like(clean_TE)

    def run():
        with tf.GradientTape() as tape:
            tape.watch([clean_TE, std_TE])
            gates, chance_TE = gating.noisy_top_k(clean_TE, k, std_TE, draw_TE)
            total = tf.reduce_sum(gates.weight_TK[:, 0] ** 2 + chance_TE[:, 0])
        return [*gates, *tape.gradient(total, [clean_TE, std_TE])]

    want = run()
    monkeypatch.setattr(top_k, "gpu_search_pays", lambda *_: True)
    for one, other in zip(run(), want, strict=True):
        if other is None:  # Every expert is chosen, whatever the noise.
            assert one is None
        else:
            np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-15)


def trained(way):
    """The losses of a few steps on a mesh, and what its devices sent."""
    top_k.gpu_search_pays = lambda *_: way != "top_k"
    if way == "search":
        top_k._MAX_READ = 0
    strategy = MeshStrategy({"batch": 2})
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = keras.Sequential([keras.Input((5, 8))])
        model.add(layers.SparseMoE(4, 12, 2, num_groups=2, capacity_factor=1.0))
        model.compile("adam", "mse", jit_compile=False)
    x_BLD = np.random.default_rng(0).normal(size=(8, 5, 8)).astype("float32")
    found = collectives.list_collectives(model.train_on_batch, x_BLD, x_BLD)
    losses = [model.train_on_batch(x_BLD, x_BLD) for _ in range(3)]
    return losses, sorted(found)


@pytest.mark.slow
def test_on_a_mesh_it_changes_neither_losses_nor_what_is_sent():
    want, *got = (
        process.run(trained, way) for way in ("top_k", "read", "search")
    )
    for losses, sent in got:
        np.testing.assert_allclose(losses, want[0], rtol=1e-6)
        assert sent == want[1]


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(
    size=st.integers(1, 900),
    k=st.integers(1, 9),
    levels=st.sampled_from([1, 2, 5, 10**6]),
    infinite=st.sampled_from([0.0, 0.5, 0.999, 1.0]),
    seed=st.integers(0, 99),
)
def test_blockwise_top_k_is_top_k_ties_and_infinities_included(
    size, k, levels, infinite, seed
):
    rng = np.random.default_rng(seed)
    x_NV = rng.integers(0, levels, (4, size)).astype("float32")
    x_NV[rng.random(x_NV.shape) < infinite] = -np.inf
    k = min(k, size)
    got = top_k.blockwise_top_k(tf.constant(x_NV), k)
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
        value_NK, index_NK = top_k.blockwise_top_k(tf.constant(broken_NV), 4)
        assert np.all((0 <= index_NK.numpy()) & (index_NK.numpy() < 1000))
        for row in (0, 2):
            np.testing.assert_array_equal(index_NK[row], want.indices[row])
            np.testing.assert_array_equal(value_NK[row], want.values[row])


def test_any_number_of_rows_in_a_graph():
    @tf.function(input_signature=[tf.TensorSpec([None, 500], tf.float32)])
    def run(x_NV):
        return top_k.blockwise_top_k(x_NV, 3)

    for rows in (0, 2):
        value_NK, index_NK = run(np.ones((rows, 500), "float32"))
        assert value_NK.shape == (rows, 3)
        assert index_NK.numpy().tolist() == [[0, 1, 2]] * rows
