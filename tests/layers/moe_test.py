"""SparseMoE by itself: values, gradients, padding, capacity, precision."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from moe_tf.layers import moe
from tests import finite_differences
from tests import keras_contract
from tests import sets
from tests.reference import moe as reference


class SparseMoETest(keras_contract.TestCase):
    def test_contract(self):
        self.run_layer_test(
            moe.SparseMoE,
            init_kwargs={"num_experts": 4, "hidden_units": 6, "k": 2},
            input_shape=(2, 3, 8),
            expected_output_shape=(2, 3, 8),
            expected_num_trainable_weights=4,
            expected_num_non_trainable_weights=0,
            expected_num_seed_generators=1,
            expected_num_losses=2,
            supports_masking=True,
            call_kwargs={"training": True},
        )

    def test_contract_with_capacity_and_another_activation(self):
        self.run_layer_test(
            moe.SparseMoE,
            init_kwargs={
                "num_experts": 3,
                "hidden_units": 6,
                "k": 1,
                "activation": "gelu",
                "importance_weight": 0.0,
                "load_weight": 0.2,
                "capacity_factor": 1.5,
                "seed": 7,
            },
            input_shape=(5, 8),
            expected_output_shape=(5, 8),
            expected_num_trainable_weights=4,
            expected_num_seed_generators=1,
            expected_num_losses=1,
            supports_masking=True,
            call_kwargs={"training": True},
        )


def layer_with_weights(num_experts=5, k=2, width=6, hidden=7, **kwargs):
    """A layer whose gate is not at its zero start."""
    kwargs = {"seed": 3, "dtype": "float64", **kwargs}
    layer = moe.SparseMoE(num_experts, hidden, k=k, **kwargs)
    layer.build((None, width))
    rng = np.random.default_rng(5)
    for kernel in (layer.router.gate_DE, layer.router.noise_DE):
        kernel.assign(rng.normal(size=kernel.shape))
    return layer


def tokens(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def arrays(layer):
    return [
        np.asarray(kernel, "float64")
        for kernel in (
            layer.router.gate_DE,
            layer.router.noise_DE,
            layer.experts.in_EDF,
            layer.experts.out_EFD,
        )
    ]


def coming_noise(layer, num_tokens):
    """The draws that the next training call will make."""
    seed = keras.random.SeedGenerator(0)
    seed.state.assign(layer.router.seed_generator.state)
    shape = (num_tokens, layer.num_experts)
    return np.asarray(keras.random.normal(shape, dtype="float64", seed=seed))


SIZES = [(5, 2), (4, 1), (4, 4), (1, 1), (12, 3)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("num_experts,k", SIZES)
def test_matches_the_numpy_oracle(num_experts, k, training):
    layer = layer_with_weights(num_experts, k)
    x_TD = tokens(9, 6)
    draw_TE = coming_noise(layer, 9) if training else None
    y_TD = layer(x_TD, training=training)
    want_TD, importance_E, load_E = reference.moe(
        x_TD, *arrays(layer), draw_TE, k
    )
    np.testing.assert_allclose(y_TD, want_TD, rtol=1e-9, atol=1e-12)
    balance = layer.balance
    np.testing.assert_allclose(balance.importance_E, importance_E, rtol=1e-6)
    np.testing.assert_allclose(balance.load_E, load_E, rtol=1e-6)
    assert np.sum(balance.assigned_E) == 9 * k
    if training:
        want = 0.1 * reference.cv_squared(importance_E)
        want += 0.1 * reference.cv_squared(load_E)
        np.testing.assert_allclose(sum(layer.losses), want, rtol=1e-6)


@sets.JIT_COMPILE
@pytest.mark.parametrize(
    "num_experts,k,masked,capacity_factor",
    [
        (5, 2, False, None),
        sets.thorough(5, 2, True, None),
        (4, 1, True, None),
        sets.thorough(3, 3, False, None),
        sets.thorough(4, 2, False, 0.75),
        (4, 2, True, 0.75),
    ],
)
def test_gradients_match_finite_differences(
    num_experts, k, masked, capacity_factor, jit_compile
):
    layer = layer_with_weights(num_experts, k, capacity_factor=capacity_factor)
    mask_T = np.arange(8) % 3 > 0 if masked else None
    gradients = finite_differences.check(
        layer, tokens(8, 6), mask_T, jit_compile
    )
    assert (np.sum(layer.balance.dropped_E) > 0) == bool(capacity_factor)
    if masked:
        np.testing.assert_array_equal(gradients[0].numpy()[~mask_T], 0.0)


def test_balancing_losses_alone_move_the_gate():
    layer = layer_with_weights()
    with tf.GradientTape() as tape:
        layer(tokens(9, 6), training=True)
        loss = sum(layer.losses)
    kernels = [layer.router.gate_DE.value, layer.router.noise_DE.value]
    for gradient in tape.gradient(loss, kernels):
        assert np.abs(gradient).max() > 1e-4


@pytest.mark.parametrize("shape", [(6,), (1, 6), (2, 3, 4, 6)])
def test_any_leading_shape(shape):
    layer = layer_with_weights()
    x = tokens(*shape)
    want_TD, *_ = reference.moe(x.reshape(-1, 6), *arrays(layer), None, 2)
    got = layer(x)
    assert got.shape == shape
    np.testing.assert_allclose(got, want_TD.reshape(shape), rtol=1e-9)


def test_a_signature_may_leave_the_width_open():
    layer = layer_with_weights()
    signature = [tf.TensorSpec((None, None, None), "float64")]
    x_BLD = tokens(2, 3, 6)
    got_BLD = tf.function(layer, input_signature=signature)(x_BLD)
    np.testing.assert_allclose(got_BLD, layer(x_BLD), rtol=1e-9)


def test_no_tokens_at_all():
    layer = layer_with_weights()
    assert layer(np.zeros((0, 6)), training=True).shape == (0, 6)
    assert float(sum(layer.losses)) == 0.0
    mask_T = np.zeros(3, bool)
    y_TD = layer(tokens(3, 6), mask=mask_T, training=True)
    np.testing.assert_array_equal(y_TD, np.zeros((3, 6)))
    assert np.isfinite(float(sum(layer.losses)))


def test_padding_changes_nothing_for_real_tokens():
    # The noise is drawn for padding too, so compare without it.
    layer = layer_with_weights()
    x_BLD = tokens(2, 5, 6)
    padded_BLD = np.concatenate([x_BLD, np.full((2, 4, 6), np.nan)], axis=1)
    mask_BL = np.arange(9)[None] < np.array([[5], [5]])
    alone_BLD = layer(x_BLD)
    numbers = [np.array(v) for v in layer.balance.variables[:4]]
    got_BLD = layer(padded_BLD, mask=mask_BL)
    np.testing.assert_array_equal(got_BLD[:, :5], alone_BLD)
    np.testing.assert_array_equal(got_BLD[:, 5:], 0.0)
    for variable, want in zip(layer.balance.variables, numbers, strict=False):
        np.testing.assert_array_equal(variable, want)


@pytest.mark.parametrize("capacity_factor", [None, 8.0])
def test_gradients_of_padding_are_zero_and_finite(capacity_factor):
    layer = layer_with_weights(capacity_factor=capacity_factor)
    x_TD = tokens(6, 6)
    x_TD[4:] = np.nan
    x_TD = tf.constant(x_TD)
    with tf.GradientTape() as tape:
        tape.watch(x_TD)
        y_TD = layer(x_TD, mask=np.arange(6) < 4, training=True)
        loss = tf.reduce_sum(tf.square(y_TD)) + sum(layer.losses)
    variables = [v.value for v in layer.trainable_variables]
    gradients = tape.gradient(loss, [x_TD, *variables])
    for gradient in gradients:
        assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradients[0][4:], 0.0)
    assert np.abs(gradients[0][:4]).max() > 0


def test_a_token_does_not_depend_on_its_batch():
    layer = layer_with_weights(dtype="float32")
    x_TD = tokens(30, 6).astype("float32")
    together_TD = layer(x_TD)
    alone_TD = ops.concatenate([layer(x_TD[t : t + 1]) for t in range(30)])
    np.testing.assert_allclose(together_TD, alone_TD, rtol=1e-5, atol=1e-6)


def test_experts_without_tokens():
    layer = layer_with_weights(num_experts=8, k=1)
    gate_DE = np.zeros((6, 8))
    gate_DE[0, 3] = 100.0  # every token goes to expert 3
    layer.router.gate_DE.assign(gate_DE)
    layer.router.noise_DE.assign(np.zeros((6, 8)))
    x_TD = np.abs(tokens(9, 6)) + 1.0
    with tf.GradientTape() as tape:
        y_TD = layer(x_TD, training=True)
    np.testing.assert_array_equal(
        layer.balance.assigned_E, 9 * (np.arange(8) == 3)
    )
    gradient = tape.gradient(y_TD, layer.experts.in_EDF.value)
    busy_E = np.abs(gradient).max((1, 2)) > 0
    np.testing.assert_array_equal(busy_E, np.arange(8) == 3)
    # Total collapse: CV squared is n - 1 = 7, for importance and for load.
    np.testing.assert_allclose(sum(layer.losses), 0.2 * 7, rtol=1e-6)


@pytest.mark.parametrize("num_experts,k", sets.split(SIZES, (), SIZES[1:4]))
@pytest.mark.parametrize(
    "masked", [pytest.param(False, marks=pytest.mark.slow), True]
)
def test_xla_gives_the_same_values_and_gradients(num_experts, k, masked):
    layer = layer_with_weights(num_experts, k)
    x_TD = tf.constant(tokens(11, 6))
    mask_T = tf.constant(np.arange(11) % 4 > 0) if masked else None
    variables = [
        layer.router.gate_DE.value,
        layer.experts.in_EDF.value,
        layer.experts.out_EFD.value,
    ]

    def step(x_TD):
        with tf.GradientTape() as tape:
            tape.watch(x_TD)
            y_TD = layer(x_TD, mask=mask_T)
            loss = tf.reduce_sum(tf.square(y_TD))
        gradients = tape.gradient(loss, [x_TD, *variables])
        return [y_TD, *map(tf.convert_to_tensor, gradients)]

    plain = tf.function(step)(x_TD)
    compiled = tf.function(step, jit_compile=True)(x_TD)
    for want, got in zip(plain, compiled, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-10)


@pytest.mark.thorough
def test_training_under_xla_matches_the_numpy_oracle():
    # XLA draws other noise from the same seed, so the draws are taken there.
    layer = layer_with_weights()
    x_TD = tokens(11, 6)

    seed = keras.random.SeedGenerator(0)
    seed.state.assign(layer.router.seed_generator.state)

    @tf.function(jit_compile=True)
    def step(x_TD):
        draw_TE = keras.random.normal((11, 5), dtype="float64", seed=seed)
        return layer(x_TD, training=True), draw_TE, sum(layer.losses)

    y_TD, draw_TE, loss = step(x_TD)
    want_TD, importance_E, load_E = reference.moe(
        x_TD, *arrays(layer), draw_TE.numpy(), 2
    )
    np.testing.assert_allclose(y_TD, want_TD, rtol=1e-8, atol=1e-10)
    want = reference.cv_squared(importance_E) + reference.cv_squared(load_E)
    assert float(loss) == pytest.approx(0.1 * want, rel=1e-6)


def traced_ways(layer, x, jit_compile):
    """Whether the layer was traced with a product over blocks or rows."""

    @tf.function(jit_compile=jit_compile)
    def forward(x):
        return layer(x)

    graph = forward.get_concrete_function(x).graph
    types = {op.type for op in graph.get_operations()}
    return "SplitV" in types, bool({"BatchMatMulV2", "BatchMatMulV3"} & types)


def test_blocks_under_xla_and_rows_elsewhere():
    layer = layer_with_weights(num_experts=4)
    x_TD = tf.constant(tokens(8, 6))
    assert traced_ways(layer, x_TD, jit_compile=False) == (True, False)
    assert traced_ways(layer, x_TD, jit_compile=True) == (False, True)


@pytest.mark.parametrize("static", [True, False])
def test_capacity_drops_the_last_tokens_and_says_so(static):
    layer = layer_with_weights(num_experts=4, k=1, capacity_factor=1.0)
    gate_DE = np.zeros((6, 4))
    gate_DE[0, 2] = 100.0
    layer.router.gate_DE.assign(gate_DE)
    layer.router.noise_DE.assign(np.zeros((6, 4)))
    x_TD = np.abs(tokens(10, 6)) + 1.0
    dropless_TD = np.asarray(layer(x_TD))
    call = tf.function(
        lambda x_TD: layer(x_TD, training=True),
        input_signature=[tf.TensorSpec((10 if static else None, 6), "float64")],
    )
    y_TD = call(x_TD)
    capacity = 3  # ceil(1.0 * 1 * 10 / 4)
    np.testing.assert_allclose(y_TD[:capacity], dropless_TD[:capacity])
    np.testing.assert_array_equal(y_TD[capacity:], 0.0)
    np.testing.assert_array_equal(layer.balance.dropped_E, [0, 0, 7, 0])
    layer.balance.reset_state()
    call(x_TD)
    numbers = layer.balance.result()
    name = layer.name
    assert float(numbers[f"{name}_dropped_fraction"]) == pytest.approx(0.7)
    assert float(numbers[f"{name}_max_over_mean_load"]) == pytest.approx(4.0)
    assert float(numbers[f"{name}_cv_load"]) == pytest.approx(3**0.5)


def test_enough_capacity_equals_dropless():
    results = []
    for capacity_factor in (None, 5.0):
        layer = layer_with_weights(capacity_factor=capacity_factor)
        variables = [v.value for v in layer.trainable_variables]
        for variable, value in zip(
            variables,
            [tokens(*v.shape, seed=9) for v in variables],
            strict=True,
        ):
            variable.assign(value)
        with tf.GradientTape() as tape:
            y_TD = layer(tokens(9, 6), training=True)
        results.append([y_TD, *tape.gradient(y_TD, variables)])
    for dropless, capped in zip(*results, strict=True):
        np.testing.assert_allclose(
            tf.convert_to_tensor(dropless), capped, rtol=1e-9, atol=1e-12
        )


def test_router_is_float32_under_mixed_bfloat16():
    layer = layer_with_weights(dtype="mixed_bfloat16")
    routing = layer.router(tokens(4, 6).astype("float32"), training=True)
    assert layer.router.gate_DE.dtype == "float32"
    for tensor in (routing.gates.weight_TK, routing.load_E):
        assert tensor.dtype == tf.float32
    assert layer.experts.in_EDF.dtype == "float32"
    y_TD = layer(tokens(4, 6).astype("float32"), training=True)
    assert y_TD.dtype == tf.bfloat16
    assert all(loss.dtype == tf.float32 for loss in layer.losses)


def test_mixed_bfloat16_is_near_float32():
    # Inputs that bfloat16 holds exactly, so that routing is the same.
    x_TD = np.round(8 * tokens(20, 6)).astype("float32") / 8
    outputs = []
    for dtype in ("float32", "mixed_bfloat16"):
        layer = layer_with_weights(dtype=dtype)
        for i, kernel in enumerate(layer.experts.trainable_variables):
            kernel.assign(0.3 * tokens(*kernel.shape, seed=i))
        outputs.append(np.asarray(ops.cast(layer(x_TD), "float32")))
    # Two products of 8-bit mantissas, 2^-8 each, on outputs of order 1.
    np.testing.assert_allclose(outputs[1], outputs[0], atol=0.05)


def test_integers_are_cast_as_keras_does():
    layer = layer_with_weights(dtype="float32")
    ids_TD = np.arange(18).reshape(3, 6) % 5
    want_TD = layer(ids_TD.astype("float32"))
    np.testing.assert_array_equal(layer(ids_TD), want_TD)


def test_padding_does_not_change_what_drops():
    # Noise would be drawn for other shapes, so it is all but turned off.
    layer = layer_with_weights(num_experts=4, k=1, capacity_factor=1.0)
    layer.router.noise_DE.assign(np.full((6, 4), -50.0))
    x_TD = np.abs(tokens(9, 6))
    alone_TD = layer(x_TD, training=True)
    dropped_E = np.array(layer.balance.dropped_E)
    assert dropped_E.sum() > 0
    padded_TD = np.concatenate([x_TD, np.full((11, 6), np.nan)])
    got_TD = layer(padded_TD, mask=np.arange(20) < 9, training=True)
    np.testing.assert_array_equal(got_TD[:9], alone_TD)
    np.testing.assert_array_equal(layer.balance.dropped_E, dropped_E)
