import keras
import numpy as np
import pytest
import tensorflow as tf

from moe_tf.dispatch import plans
from moe_tf.experts import gpu
from tests import sets

needs_jax = pytest.mark.skipif(
    gpu.obstacle(64, 64, "float32", "relu") is not None,
    reason=str(gpu.obstacle(64, 64, "float32", "relu")),
)

WIDTH, HIDDEN = 64, 128
BLOCK = gpu.BLOCK

ACTIVATIONS = {
    name: keras.activations.get(name)
    for name in ("gelu", "linear", "relu", "sigmoid", "silu", "tanh")
} | {"gelu_tanh": lambda x: keras.activations.gelu(x, approximate=True)}

OTHER_ACTIVATIONS = [name for name in ACTIVATIONS if name != "silu"]


def route(counts, seed=0):
    """Tokens of one choice each, `counts[e]` of expert `e`, shuffled."""
    expert_A = np.repeat(np.arange(len(counts)), counts).astype("int32")
    return np.random.default_rng(seed).permutation(expert_A)[:, None]


def inputs(counts, dtype, kernel_dtype=None, seed=1):
    """Tokens, matrices and an incoming gradient, all of moderate size."""
    rng = np.random.default_rng(seed)
    tokens, experts = sum(counts), len(counts)
    shapes = (
        (tokens, WIDTH),
        (experts, WIDTH, HIDDEN),
        (experts, HIDDEN, WIDTH),
        (tokens, WIDTH),
    )
    scales = (1.0, WIDTH**-0.5, HIDDEN**-0.5, 1.0)
    x, w_in, w_out, dy = (
        tf.cast(rng.standard_normal(shape) * scale, dtype)
        for shape, scale in zip(shapes, scales, strict=True)
    )
    kernel_dtype = kernel_dtype or dtype
    return x, tf.cast(w_in, kernel_dtype), tf.cast(w_out, kernel_dtype), dy


def fused(counts, x_TD, in_EDF, out_EFD, dy_TD, **kwargs):
    """Answers and gradients of tokens and matrices, by way of the kernels."""
    expert_TK = tf.constant(route(counts))

    @tf.function(jit_compile=True)
    def run(x_TD, in_EDF, out_EFD, dy_TD):
        with tf.GradientTape() as tape:
            tape.watch((x_TD, in_EDF, out_EFD))
            plan = plans.plan_blocks(expert_TK, len(counts), BLOCK)
            x_SD = plan.dispatch(x_TD)
            y_SD = gpu.feed_forward(x_SD, in_EDF, out_EFD, plan, **kwargs)
            y_TD = plan.collect(y_SD)[:, 0]
        gradients = tape.gradient(
            y_TD, (x_TD, in_EDF, out_EFD), output_gradients=dy_TD
        )
        return y_TD, *gradients, y_SD

    return run(x_TD, in_EDF, out_EFD, dy_TD)


def expert_by_expert(counts, x_TD, in_EDF, out_EFD, dy_TD, activation):
    """The same in float64, one expert after the other."""
    expert_T = route(counts)[:, 0]
    arguments = [tf.cast(v, "float64") for v in (x_TD, in_EDF, out_EFD)]
    with tf.GradientTape() as tape:
        tape.watch(arguments)
        x_TD, in_EDF, out_EFD = arguments
        y_TD = tf.zeros_like(x_TD)
        for e in range(len(counts)):
            (token_C,) = np.nonzero(expert_T == e)
            h_CF = activation(tf.gather(x_TD, token_C) @ in_EDF[e])
            y_TD = tf.tensor_scatter_nd_add(
                y_TD, token_C[:, None], h_CF @ out_EFD[e]
            )
    gradients = tape.gradient(
        y_TD,
        arguments,
        output_gradients=tf.cast(dy_TD, "float64"),
        unconnected_gradients="zero",
    )
    return y_TD, *map(tf.convert_to_tensor, gradients)


def assert_near(got, want, tolerance):
    """Each relative to the largest entry of what is wanted."""
    for name, ours, theirs in zip(
        ("y", "dx", "din", "dout"), got, want, strict=False
    ):
        ours = tf.cast(ours, "float64").numpy()
        theirs = theirs.numpy()
        error = np.abs(ours - theirs).max() / np.abs(theirs).max()
        assert error < tolerance, (name, error)


# An expert without tokens first, in the middle and last; one with a whole
# number of blocks; one with more than one; one with a single token.
COUNTS = ([0, 150, 128, 0, 1, 0], [300, 5], [0, 0, 130], [60])


@needs_jax
@pytest.mark.parametrize(
    "counts,recompute",
    [
        sets.thorough(COUNTS[0], True),
        (COUNTS[1], False),
        sets.thorough(COUNTS[3], True),
        *(
            pytest.param(counts, recompute, marks=pytest.mark.slow)
            for counts in COUNTS
            for recompute in (False, True)
        ),
    ],
)
def test_matches_one_expert_after_the_other(counts, recompute):
    arguments = inputs(counts, "float32")
    got = fused(counts, *arguments, activation="silu", recompute=recompute)
    want = expert_by_expert(counts, *arguments, keras.activations.silu)
    assert_near(got, want, 2e-6)


@pytest.mark.thorough
@needs_jax
@pytest.mark.parametrize(
    "dtype,tolerance", [sets.thorough("bfloat16", 2e-2), ("float16", 3e-3)]
)
@pytest.mark.parametrize(
    "recompute", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_half_precision(dtype, tolerance, recompute):
    counts = COUNTS[0]
    arguments = inputs(counts, dtype)
    got = fused(counts, *arguments, activation="silu", recompute=recompute)
    assert {value.dtype.name for value in got} == {dtype}
    want = expert_by_expert(counts, *arguments, keras.activations.silu)
    assert_near(got, want, tolerance)


@needs_jax
@pytest.mark.parametrize(
    "name", [sets.thorough("silu"), *map(sets.slow, OTHER_ACTIVATIONS)]
)
def test_activations(name):
    counts = [100, 30]
    x, *rest = inputs(counts, "float32")
    x = x.numpy()
    x[:50] *= 10.0  # far into the tails
    got = fused(counts, x, *rest, activation=name)
    want = expert_by_expert(counts, x, *rest, ACTIVATIONS[name])
    assert_near(got, want, 2e-6)


@needs_jax
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(
    "dtype,tolerance", [("float32", 1e-6), ("bfloat16", 1.5e-4)]
)
def test_slopes_are_those_of_the_functions(name, dtype, tolerance):
    """On a CPU half precision differs in the fit of the normal cdf alone."""
    from moe_tf.experts import gpu_activations

    a = np.linspace(-30.0, 30.0, 6001)
    wide = tf.constant(a, "float64")
    with tf.GradientTape() as tape:
        tape.watch(wide)
        want = ACTIVATIONS[name](wide)
    functions = gpu_activations.functions(dtype, interpret=True)
    ours = gpu_activations.ACTIVATIONS[name]
    value = ours.value(functions, a.astype("float32"))
    slope = ours.slope(
        functions, value if ours.of_value else a.astype("float32")
    )
    np.testing.assert_allclose(value, want, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(
        slope, tape.gradient(want, wide), rtol=tolerance, atol=tolerance
    )


@needs_jax
def test_activations_are_listed():
    from moe_tf.experts import gpu_activations

    assert gpu.ACTIVATIONS == tuple(gpu_activations.ACTIVATIONS)


@pytest.mark.thorough
@needs_jax
@pytest.mark.parametrize("recompute", [False, sets.thorough(True)])
def test_slope_of_relu_at_zero_is_zero(recompute):
    counts = [100, 30]
    x, *rest = inputs(counts, "float32")
    x = x.numpy()
    x[::2] = 0.0
    got = fused(counts, x, *rest, activation="relu", recompute=recompute)
    assert (got[1].numpy()[::2] == 0.0).all()
    assert (got[1].numpy()[1::2] != 0.0).any()


TILES = [(64, 64, 32, 4, 3, 1), (128, 32, 64, 4, 3, 2), (64, 128, 16, 8, 4, 5)]


@needs_jax
@pytest.mark.parametrize(
    "tiles", [*map(sets.slow, TILES[:2]), sets.thorough(TILES[2])]
)
def test_tiles_do_not_change_answers(tiles):
    jax = pytest.importorskip("jax")
    from moe_tf.experts import gpu_products

    expert_N = jax.numpy.array([0, 2, 2, 2, 2, 2], "int32")
    table = gpu_products.table(expert_N, jax.numpy.array([1, 0, 300], "int32"))
    assert table.used_N.tolist() == [1, 128, 128, 44, 0, 0]
    rng = np.random.default_rng(0)
    x_SD = rng.integers(-3, 4, (6, BLOCK, WIDTH)).astype("float32")
    x_SD *= np.arange(BLOCK)[:, None] < table.used_N[:, None, None]
    x_SD = x_SD.reshape(-1, WIDTH)
    w_EDF = rng.integers(-3, 4, (3, WIDTH, HIDDEN)).astype("float32")
    options = {
        "table": table,
        "tiles": gpu_products.Tiles(*tiles),
        "interpret": True,
    }
    w_SDF = np.repeat(w_EDF[expert_N], BLOCK, axis=0)
    want_SF = np.einsum("SD,SDF->SF", x_SD, w_SDF)
    (got_SF,) = gpu_products.product(x_SD, w_EDF, **options)
    np.testing.assert_array_equal(got_SF, want_SF)
    (got_SF,) = gpu_products.product(
        x_SD, w_EDF.swapaxes(1, 2), transposed=True, **options
    )
    np.testing.assert_array_equal(got_SF, want_SF)
    got_EDF = gpu_products.outer(x_SD, want_SF, **options)
    for e in range(3):
        own_S = np.repeat(expert_N == e, BLOCK)
        np.testing.assert_array_equal(
            got_EDF[e], x_SD[own_S].T @ want_SF[own_S]
        )


@pytest.mark.thorough
@needs_jax
def test_blocks_without_tokens():
    counts = [0, 40, 0]
    *_, y_SD = fused(counts, *inputs(counts, "float32"), activation="sigmoid")
    y_SD = y_SD.numpy()
    assert y_SD.shape == (3 * BLOCK, WIDTH)
    assert (np.abs(y_SD[:40]).min(axis=1) > 0).all()
    assert (y_SD[BLOCK:] == 0).all()


@pytest.mark.slow
@needs_jax
def test_gradients_of_wide_matrices_are_not_rounded():
    counts = [70, 200]
    arguments = inputs(counts, "bfloat16", kernel_dtype="float32")
    wide = fused(counts, *arguments, activation="relu")
    x_TD, *matrices, dy_TD = arguments
    narrow_matrices = [tf.cast(matrix, "bfloat16") for matrix in matrices]
    narrow = fused(counts, x_TD, *narrow_matrices, dy_TD, activation="relu")
    assert [value.dtype.name for value in wide[:4]] == [
        "bfloat16", "bfloat16", "float32", "float32",
    ]  # fmt: skip
    for ours, theirs in zip(wide, narrow, strict=True):
        np.testing.assert_array_equal(
            tf.cast(ours, theirs.dtype).numpy(), theirs.numpy()
        )
    assert (
        (tf.cast(tf.cast(wide[2], "bfloat16"), "float32") != wide[2])
        .numpy()
        .any()
    )


@needs_jax
def test_masked_tokens_have_no_slot():
    x_TD, in_EDF, out_EFD, _ = inputs([100, 60], "float32")
    expert_TK = route([100, 60])
    expert_TK[::3] = 2  # the number of experts: nobody's

    @tf.function(jit_compile=True)
    def run(x_TD):
        plan = plans.plan_blocks(tf.constant(expert_TK), 2, BLOCK)
        x_SD = plan.dispatch(x_TD)
        y_SD = gpu.feed_forward(x_SD, in_EDF, out_EFD, plan, "relu")
        return plan.collect(y_SD)[:, 0]

    got_TD = run(x_TD).numpy()
    x_TD, in_EDF, out_EFD = (v.numpy() for v in (x_TD, in_EDF, out_EFD))
    for t, (e,) in enumerate(expert_TK):
        want_D = np.zeros(WIDTH)
        if e < 2:
            want_D = np.maximum(x_TD[t] @ in_EDF[e], 0) @ out_EFD[e]
        np.testing.assert_allclose(got_TD[t], want_D, atol=1e-5)


@pytest.mark.thorough
@needs_jax
def test_assignments_over_the_limit_have_no_slot():
    counts = [200, 60, 0, 300]
    x_TD, in_EDF, out_EFD, dy_TD = inputs(counts, "float32")
    expert_TK = tf.constant(route(counts))

    @tf.function(jit_compile=True)
    def run(x_TD, in_EDF, out_EFD):
        with tf.GradientTape() as tape:
            tape.watch((x_TD, in_EDF, out_EFD))
            plan = plans.plan_blocks(expert_TK, 4, BLOCK, limit=130)
            x_SD = plan.dispatch(x_TD)
            y_SD = gpu.feed_forward(x_SD, in_EDF, out_EFD, plan, "silu")
            y_TD = plan.collect(y_SD)[:, 0]
        gradients = tape.gradient(
            y_TD, (x_TD, in_EDF, out_EFD), output_gradients=dy_TD
        )
        placed_T = plan.slot_TK[:, 0] < tf.size(plan.assignment_S)
        return placed_T, plan.count_E, y_TD, *gradients

    placed_T, count_E, *got = run(x_TD, in_EDF, out_EFD)
    assert count_E.numpy().tolist() == counts
    placed_T = placed_T.numpy()
    assert np.bincount(route(counts)[placed_T, 0]).tolist() == [130, 60, 0, 130]
    kept_TD = placed_T[:, None].astype("float32")
    y_TD, dx_TD, *matrices = expert_by_expert(
        counts, x_TD * kept_TD, in_EDF, out_EFD, dy_TD * kept_TD,
        keras.activations.silu,
    )  # fmt: skip
    assert_near(got, (y_TD, dx_TD, *matrices), 2e-6)
    assert (got[0].numpy()[~placed_T] == 0.0).all()


@needs_jax
def test_refuses_other_plans():
    expert_TK = tf.constant(route([100, 60]))
    x_TD, in_EDF, out_EFD, _ = inputs([100, 60], "float32")

    def run(plan, x_SD):
        gpu.feed_forward(x_SD, in_EDF, out_EFD, plan, "relu")

    with pytest.raises(ValueError, match="plan of Rows"):
        run(plans.plan_rows(expert_TK, 2), x_TD)
    with pytest.raises(ValueError, match=r"128 rows.*\(12, 64\), blocks=3"):
        run(plans.plan_blocks(expert_TK, 2, BLOCK), x_TD[:12])
    with pytest.raises(ValueError, match="dtype='float64'"):
        run(plans.plan_rows(expert_TK, 2), tf.cast(x_TD, "float64"))
