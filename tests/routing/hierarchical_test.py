import keras
import numpy as np
import pytest
import tensorflow as tf

from moe_tf.layers import moe
from moe_tf.routing import hierarchical
from tests import finite_differences
from tests import keras_contract
from tests import sets
from tests.reference import hierarchical as reference
from tests.reference import moe as flat_reference


class HierarchicalTest(keras_contract.TestCase):
    @pytest.mark.thorough
    def test_contract(self):
        self.run_layer_test(
            moe.SparseMoE,
            init_kwargs={
                "num_experts": 12,
                "hidden_units": 6,
                "branching": [3, 4],
            },
            input_shape=(2, 3, 8),
            expected_output_shape=(2, 3, 8),
            expected_num_trainable_weights=6,
            expected_num_non_trainable_weights=0,
            expected_num_seed_generators=1,
            expected_num_losses=2,
            supports_masking=True,
            call_kwargs={"training": True},
        )


BRANCHINGS = [((3, 4), 2), ((4, 2), 2), ((2, 5), 2), ((2, 3), 1), ((3, 3), 3)]


def layer_with_weights(branching, k, **kwargs):
    """A layer whose gates are not at their zero start."""
    kwargs = {"seed": 3, "dtype": "float64", **kwargs}
    num_branches, branch_size = branching
    layer = moe.SparseMoE(
        num_branches * branch_size, 5, k, branching=branching, **kwargs
    )
    layer.build((None, 6))
    rng = np.random.default_rng(5)
    for kernel in layer.router.trainable_variables:
        kernel.assign(rng.normal(size=kernel.shape))
    return layer


def kernels(layer):
    """Primary and secondary gate and noise kernels."""
    gates = [np.asarray(v) for v in layer.router.trainable_variables]
    return gates[:2], gates[2:]


def tokens(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def coming_draws(layer, num_tokens):
    """The draws that the next training call will make."""
    seed = keras.random.SeedGenerator(0)
    seed.state.assign(layer.router.seed_generator.state)
    num_branches, branch_size = layer.router.branching
    return [
        np.asarray(keras.random.normal(shape, dtype="float64", seed=seed))
        for shape in (
            (num_tokens, num_branches),
            (num_tokens, layer.k, branch_size),
        )
    ]


def oracle(layer, x_TD, draws, mask_T=None):
    gate_TPQ, importance_PQ, load_PQ = reference.route(
        x_TD, *kernels(layer), layer.k, draws, mask_T
    )
    in_EDF = np.asarray(layer.experts.in_EDF)
    out_EFD = np.asarray(layer.experts.out_EFD)
    y_TD = np.zeros_like(x_TD)
    for t, gate_E in enumerate(gate_TPQ.reshape(len(x_TD), -1)):
        for e in np.flatnonzero(gate_E):
            y_TD[t] += gate_E[e] * flat_reference.expert(
                x_TD[t], in_EDF[e], out_EFD[e]
            )
    return y_TD, importance_PQ.ravel(), load_PQ.ravel()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "branching,k", sets.split(BRANCHINGS, (BRANCHINGS[0], BRANCHINGS[3]))
)
def test_matches_the_numpy_oracle(branching, k, training, masked):
    layer = layer_with_weights(branching, k)
    x_TD = tokens(9, 6)
    mask_T = np.arange(9) % 4 > 0 if masked else None
    draws = coming_draws(layer, 9) if training else None
    y_TD = layer(x_TD, mask=mask_T, training=training)
    want_TD, importance_E, load_E = oracle(layer, x_TD, draws, mask_T)
    np.testing.assert_allclose(y_TD, want_TD, rtol=1e-9, atol=1e-12)
    balance = layer.balance
    np.testing.assert_allclose(balance.importance_E, importance_E, rtol=1e-5)
    np.testing.assert_allclose(balance.load_E, load_E, rtol=1e-5, atol=1e-6)
    num_tokens = 9 if mask_T is None else mask_T.sum()
    assert np.sum(balance.assigned_E) == num_tokens * k * k
    if training:
        want = 0.1 * flat_reference.cv_squared(importance_E)
        want += 0.1 * flat_reference.cv_squared(load_E)
        np.testing.assert_allclose(sum(layer.losses), want, rtol=1e-6)


def test_expected_load_is_near_the_number_of_tokens():
    # Equation 14 estimates the count: over many tokens they agree.
    layer = layer_with_weights((3, 4), 2, dtype="float32")
    x_TD = tokens(20_000, 6).astype("float32")
    layer(x_TD, training=True)
    load_E = np.asarray(layer.balance.load_E)
    assigned_E = np.asarray(layer.balance.assigned_E)
    assert load_E.sum() == pytest.approx(80_000, rel=0.01)
    # Five standard deviations of a count of 20,000 tokens.
    np.testing.assert_allclose(load_E, assigned_E, atol=5 * 20_000**0.5 / 2)


@pytest.mark.parametrize(
    "jit_compile", [False, pytest.param(True, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("masked", [sets.thorough(False), True])
@pytest.mark.parametrize(
    "branching,k",
    [((3, 4), 2), sets.thorough((2, 3), 1), sets.thorough((2, 2), 2)],
)
def test_gradients_match_finite_differences(branching, k, masked, jit_compile):
    # Through both gates: the task's loss and both balancing losses together.
    layer = layer_with_weights(branching, k)
    mask_T = np.arange(8) % 3 > 0 if masked else None
    finite_differences.check(layer, tokens(8, 6), mask_T, jit_compile)


def test_the_load_loss_alone_moves_both_gates():
    # Load_i(X_i)_j alone would have no gradient to the primary gate.
    layer = layer_with_weights((3, 4), 2, importance_weight=0.0)
    with tf.GradientTape() as tape:
        layer(tokens(9, 6), training=True)
        loss = sum(layer.losses)
    variables = [v.value for v in layer.router.trainable_variables]
    for gradient in tape.gradient(loss, variables):
        assert np.abs(gradient).max() > 1e-4


def test_a_branch_without_tokens():
    layer = layer_with_weights((4, 2), 1)
    gate_DP = np.zeros((6, 4))
    gate_DP[0, 2] = 100.0  # every token goes to branch 2
    layer.router.primary_gate_DP.assign(gate_DP)
    layer.router.primary_noise_DP.assign(np.zeros((6, 4)))
    x_TD = np.abs(tokens(9, 6)) + 1.0
    with tf.GradientTape() as tape:
        y_TD = layer(x_TD, training=True)
        loss = tf.reduce_sum(y_TD) + sum(layer.losses)
    assigned_PQ = np.asarray(layer.balance.assigned_E).reshape(4, 2)
    np.testing.assert_array_equal(assigned_PQ.sum(1), [0, 0, 9, 0])
    for gradient in tape.gradient(
        loss, [v.value for v in layer.trainable_variables]
    ):
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    "branching,k",
    [
        sets.thorough(*BRANCHINGS[0]),
        *(sets.slow(*row) for row in BRANCHINGS[1:]),
    ],
)
def test_xla_gives_the_same(branching, k):
    layer = layer_with_weights(branching, k)
    x_TD = tf.constant(tokens(11, 6))
    mask_T = tf.constant(np.arange(11) % 4 > 0)
    variables = [v.value for v in layer.trainable_variables]

    def step(x_TD):
        with tf.GradientTape() as tape:
            tape.watch(x_TD)
            y_TD = layer(x_TD, mask=mask_T)
            loss = tf.reduce_sum(tf.square(y_TD))
        gradients = tape.gradient(
            loss, [x_TD, *variables], unconnected_gradients="zero"
        )
        return [y_TD, *map(tf.convert_to_tensor, gradients)]

    plain = tf.function(step)(x_TD)
    compiled = tf.function(step, jit_compile=True)(x_TD)
    for want, got in zip(plain, compiled, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-10)


@sets.JIT_COMPILE
def test_a_broken_token_shows_and_stays_alone(jit_compile):
    layer = layer_with_weights((3, 4), 2)
    others = np.arange(9) != 3

    @tf.function(jit_compile=jit_compile)
    def both_ways(x_TD):
        evaluated_TD = layer(x_TD)
        trained_TD = layer(x_TD, training=True)
        return evaluated_TD, trained_TD, tf.stack(layer.losses)

    want_TD, *_ = both_ways(tf.constant(tokens(9, 6)))
    for bad in (np.nan, np.inf, -np.inf):
        x_TD = tokens(9, 6)
        x_TD[3, 2] = bad
        evaluated_TD, trained_TD, losses = both_ways(tf.constant(x_TD))
        for y_TD in (evaluated_TD.numpy(), trained_TD.numpy()):
            assert np.isnan(y_TD[3]).all()
            assert np.isfinite(y_TD[others]).all()
        np.testing.assert_allclose(
            evaluated_TD.numpy()[others], want_TD.numpy()[others], rtol=1e-9
        )
        assert np.isnan(losses).all()


@sets.JIT_COMPILE
def test_equal_logits_are_settled_by_order(jit_compile):
    # Groups 0 and 1, and in each experts 0 and 1: a quarter each.
    layer = layer_with_weights((3, 4), 2)
    for kernel in layer.router.trainable_variables:
        kernel.assign(np.zeros(kernel.shape))
    tf.function(layer, jit_compile=jit_compile)(tf.constant(tokens(6, 6)))
    want_PQ = np.zeros((3, 4))
    want_PQ[:2, :2] = 6
    balance = layer.balance
    np.testing.assert_array_equal(balance.assigned_E, want_PQ.ravel())
    np.testing.assert_allclose(balance.importance_E, want_PQ.ravel() / 4)


def test_starts_balanced():
    layer = moe.SparseMoE(64, 4, branching=(8, 8), seed=0)
    layer(tokens(4000, 5).astype("float32"), training=True)
    assert layer.k == 2
    share_E = np.asarray(layer.balance.assigned_E) / 4000
    np.testing.assert_allclose(share_E, 4 / 64, atol=0.02)


def test_capacity_counts_all_experts_of_a_token():
    # ceil(1.0 * 2 * 2 * 12 / 12) slots for each of the twelve experts.
    layer = layer_with_weights((3, 4), 2, capacity_factor=1.0)
    layer(tokens(12, 6), training=True)
    kept_E = np.asarray(layer.balance.assigned_E) - layer.balance.dropped_E
    assert kept_E.max() == 4
    assert np.sum(layer.balance.dropped_E) > 0


def test_only_the_gates_of_chosen_branches_are_computed():
    # Paper, section 12: 2 d (a + k b) operations a token, not 2 d (a + a b).
    router = hierarchical.HierarchicalRouter((8, 16), k=2)
    router.build((None, 32))

    @tf.function
    def route(x_TD):
        return router(x_TD, training=True).gates.weight_TK

    graph = route.get_concrete_function(tf.TensorSpec((100, 32))).graph
    products = [op for op in graph.get_operations() if op.type == "MatMul"]
    primary = [op for op in products if op.outputs[0].shape[-1] == 8]
    secondary = [op for op in products if op.outputs[0].shape[-1] == 32]
    assert (len(primary), len(secondary)) == (2, 8)
    # Each secondary product has the rows that chose its branch.
    assert all(op.inputs[0].op.type == "SplitV" for op in secondary)


@pytest.mark.parametrize(
    "message,kwargs",
    [
        ("product.*branching=.3, 5.*num_experts=12", {"branching": (3, 5)}),
        ("a pair.*branching=12", {"branching": 12}),
        ("a pair.*branching=.2, 2, 3", {"branching": (2, 2, 3)}),
        (r"branching\[0\].*=0", {"branching": (0, 12)}),
        (r"branching\[1\].*=4.0", {"branching": (3, 4.0)}),
        ("`k` must be at most.*k=4", {"branching": (3, 4), "k": 4}),
        (
            "`branching` is for.*switch",
            {"branching": (3, 4), "gating": "switch"},
        ),
        (
            "`z_loss_weight` has no meaning",
            {"branching": (3, 4), "z_loss_weight": 0.1},
        ),
    ],
)
def test_bad_arguments_name_the_field(message, kwargs):
    with pytest.raises(ValueError, match=message):
        moe.SparseMoE(12, 5, **kwargs)
