"""Strictly balanced gating, appendix F, and expert choice."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from moe_tf.layers import moe
from moe_tf.routing import batchwise
from moe_tf.routing import expert_choice
from tests import finite_differences
from tests import keras_contract
from tests import sets
from tests.reference import batchwise as reference
from tests.reference import moe as moe_reference


class RouterTest(keras_contract.TestCase):
    def test_contract(self):
        for cls, settings, num_weights in (
            (batchwise.BatchwiseRouter, {"threshold_weight": 0.1}, 2),
            (expert_choice.ExpertChoiceRouter, {}, 1),
        ):
            self.run_layer_test(
                cls,
                init_kwargs={
                    "num_experts": 4,
                    "k": 2,
                    "importance_weight": 0.1,
                    "z_loss_weight": 0.2,
                    **settings,
                },
                input_shape=(6, 8),
                expected_num_trainable_weights=num_weights,
                expected_num_losses=0,
                supports_masking=True,
                run_training_check=False,
                run_mixed_precision_check=False,  # float32 by design
                call_kwargs={"training": True},
            )


@pytest.mark.parametrize("weight", [0, -1.0, float("nan"), float("inf")])
def test_a_bad_threshold_weight_names_the_field(weight):
    with pytest.raises(ValueError, match="`threshold_weight`.*Received"):
        batchwise.BatchwiseRouter(4, threshold_weight=weight)


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def layer_of(name, num_experts, k, width=6, dtype="float64", **settings):
    """A layer with a gate, and with thresholds that differ."""
    make = {
        "batchwise": batchwise.BatchwiseRouter,
        "expert_choice": expert_choice.ExpertChoiceRouter,
    }[name]
    router = make(num_experts, k=k, dtype=dtype, **settings)
    layer = moe.SparseMoE(num_experts, 7, gating=router, dtype=dtype)
    layer.build((None, width))
    router.gate_DE.assign(draw(5, width, num_experts))
    if name == "batchwise":
        spread_E = np.random.default_rng(6).uniform(0.3, 1.5, num_experts)
        router.threshold_E.assign(spread_E / num_experts)
    return layer


def oracle(layer, x_TD, training, mask_T=None):
    """Gates `(T, E)` and which experts are chosen, bool `(T, E)`."""
    router = layer.router
    score_TE = reference.scores(x_TD, np.asarray(router.gate_DE, "float64"))
    by_threshold = isinstance(router, batchwise.BatchwiseRouter)
    if by_threshold and not training:
        threshold_E = np.asarray(router.threshold_E)
        chosen_TE = reference.threshold_mask(score_TE, threshold_E, mask_T)
    else:
        num_real = len(x_TD) if mask_T is None else mask_T.sum()
        m = reference.tokens_an_expert(num_real, router.k, router.num_experts)
        chosen_TE = reference.batchwise_mask(score_TE, m, mask_T)
    if by_threshold:
        return reference.renormalised(score_TE, chosen_TE), chosen_TE
    return score_TE * chosen_TE, chosen_TE


def mixture(layer, x_TD, gate_TE):
    kernels = map(np.asarray, layer.experts.trainable_variables)
    return reference.mixture(x_TD, gate_TE, *kernels)


# (experts, k, tokens, masked): m whole, not whole, one expert, all, and more
# experts than columns that are summed without a loop.
NAMES = "batchwise", "expert_choice"
SIZES = [
    (4, 2, 12, False),
    (5, 2, 11, True),
    (1, 1, 3, True),
    (3, 3, 7, False),
    (20, 3, 13, True),
    (40, 1, 30, False),
]


@pytest.mark.parametrize(
    "name,num_experts,k,num_tokens,masked,jit_compile",
    sets.split(
        [
            (name, *size, jit_compile)
            for name in NAMES
            for size in SIZES
            for jit_compile in (False, True)
        ],
        [(name, *SIZES[1], False) for name in NAMES],
        [
            (name, *size, True)
            for name in NAMES
            for size in (SIZES[0], *SIZES[2:5])
        ],
    ),
)
def test_matches_the_numpy_oracle(
    name, num_experts, k, num_tokens, masked, jit_compile
):
    layer = layer_of(name, num_experts, k)
    x_TD = draw(0, num_tokens, 6)
    mask_T = np.arange(num_tokens) % 3 > 0 if masked else None
    num_real = num_tokens if mask_T is None else mask_T.sum()
    m = -(-k * num_real // num_experts)

    @tf.function(jit_compile=jit_compile)
    def both_ways(x_TD):
        y_TD = layer(x_TD, mask=mask_T)
        assigned_E = tf.identity(layer.balance.assigned_E.value)
        return (y_TD, layer(x_TD, mask=mask_T, training=True), assigned_E)

    *outputs, assigned_E = both_ways(tf.constant(x_TD))
    counts = assigned_E, layer.balance.assigned_E
    for y_TD, count_E, training in zip(
        outputs, counts, (False, True), strict=True
    ):
        gate_TE, chosen_TE = oracle(layer, x_TD, training, mask_T)
        want_TD = mixture(layer, x_TD, gate_TE)
        np.testing.assert_allclose(y_TD, want_TD, rtol=1e-9, atol=1e-12)
        np.testing.assert_array_equal(count_E, chosen_TE.sum(0))
        if training or name == "expert_choice":
            np.testing.assert_array_equal(count_E, np.full(num_experts, m))
        without_T = ~chosen_TE.any(1)
        np.testing.assert_array_equal(y_TD.numpy()[without_T], 0.0)
        if training and num_experts == 40:
            assert without_T.any()


@sets.JIT_COMPILE_SLOW
@pytest.mark.parametrize(
    "name,num_experts,k,masked",
    [
        ("batchwise", 5, 2, True),
        sets.thorough("batchwise", 20, 3, False),
        ("expert_choice", 5, 2, True),
    ],
)
def test_gradients_match_finite_differences(
    name, num_experts, k, masked, jit_compile
):
    # Equation 20 gives the gate no gradient although its value depends on
    # it, so it weighs nothing here; it has a test of its own below.
    settings = {"threshold_weight": 1e-15} if name == "batchwise" else {}
    layer = layer_of(name, num_experts, k, importance_weight=0.5, **settings)
    mask_T = np.arange(9) % 4 > 0 if masked else None
    gradients = finite_differences.check(
        layer, draw(0, 9, 6), mask_T, jit_compile, leave_out=["thresholds"]
    )
    assert all(map(np.any, gradients))


@sets.JIT_COMPILE
@pytest.mark.parametrize("masked", [sets.thorough(False), True])
def test_the_threshold_loss_counts_tokens(masked, jit_compile):
    # Equation 20: dL/dT_i = -(tokens that pass T_i - m), in whole numbers;
    # nothing for the gate, nothing for x.
    weight, num_experts, k = 0.25, 5, 2
    layer = layer_of(
        "batchwise",
        num_experts,
        k,
        importance_weight=0.0,
        threshold_weight=weight,
    )
    router = layer.router
    x_TD = tf.constant(draw(0, 17, 6))
    real_T = np.arange(17) % 4 > 0 if masked else np.ones(17, bool)
    mask_T = real_T if masked else None

    @tf.function(jit_compile=jit_compile)
    def step(x_TD):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x_TD)
            layer(x_TD, mask=mask_T, training=True)
            (loss,) = layer.losses
        threshold, gate = router.threshold_E.value, router.gate_DE.value
        none = [tape.gradient(loss, v) for v in (gate, x_TD)]
        assert none == [None, None]
        return loss, tape.gradient(loss, threshold)

    loss, gradient_E = step(x_TD)
    score_TE = reference.scores(x_TD.numpy(), router.gate_DE.numpy())
    threshold_E = router.threshold_E.numpy()
    m = reference.tokens_an_expert(real_T.sum(), k, num_experts)
    want = reference.batchwise_loss(score_TE, threshold_E, m, mask_T)
    assert want > 0
    assert float(loss) == pytest.approx(weight * want, rel=1e-9)
    assert float(
        layer.balance.latest()["threshold_loss"]
    ) == pytest.approx(want, rel=1e-6)  # fmt: skip
    passing_E = (score_TE[real_T] > threshold_E).sum(0)
    assert (passing_E != m).any()
    np.testing.assert_array_equal(gradient_E, -weight * (passing_E - m))


@sets.JIT_COMPILE
@pytest.mark.parametrize("training", [sets.thorough(False), True])
def test_padding_does_not_change_what_is_reported(training, jit_compile):
    # Also outside training, where the thresholds themselves choose, so that
    # the threshold loss is 0.
    layer = moe.SparseMoE(
        4, 7, gating="batchwise", k=2, eval_capacity_factor=4.0
    )
    layer.build((None, 6))
    layer.router.gate_DE.assign(draw(5, 6, 4))
    layer.router.threshold_E.assign([0.1, 0.2, 0.15, 0.3])
    x_TD = draw(0, 10, 6).astype("float32")
    padded_TD = np.concatenate([x_TD, np.full((7, 6), np.nan, "float32")])

    @tf.function(jit_compile=jit_compile)
    def call(x_TD, mask_T):
        layer(x_TD, mask=mask_T, training=training)

    call(tf.constant(x_TD), tf.ones(10, "bool"))
    wants = {v.path: v.numpy() for v in layer.balance.variables}
    scalars = {k: float(v) for k, v in layer.balance.latest().items()}
    assert training or scalars["threshold_loss"] == 0.0
    call(tf.constant(padded_TD), tf.range(17) < 10)
    for name, value in layer.balance.latest().items():
        assert float(value) == pytest.approx(scalars[name], abs=1e-5), name
    for vector in layer.balance.vectors:
        np.testing.assert_allclose(vector, wants[vector.path], rtol=1e-5)


def logits_layer(name, k, dtype="float32"):
    """A router of two experts whose logits are its inputs."""
    layer = layer_of(name, 2, k, width=2, dtype=dtype).router
    layer.gate_DE.assign(np.eye(2))
    return layer


def test_gradients_stay_finite_where_the_softmax_almost_vanishes():
    # Expert 1 takes tokens 2 and 3, which expert 0 leaves, for scores near
    # e^-86; their share of their own sum, equation 16, is the constant 1.
    layer = logits_layer("batchwise", k=1)
    x_TD = np.array([[0, -110], [0, -109], [0, -86], [0, -85]], "float32")
    x_TD = tf.constant(x_TD)
    with tf.GradientTape() as tape:
        tape.watch(x_TD)
        weight_TK = layer(x_TD, training=True).gates.weight_TK
        loss = 1e4 * tf.reduce_sum(weight_TK)
    np.testing.assert_allclose(np.sum(weight_TK, axis=1), 1.0)
    np.testing.assert_allclose(tape.gradient(loss, x_TD), 0.0, atol=1e-2)


def test_at_inference_a_token_does_not_depend_on_its_batch():
    layer = layer_of("batchwise", 5, 2)
    x_TD = draw(0, 20, 6)
    alone_TD = np.concatenate([layer(x_TD[t : t + 1]) for t in range(20)])
    np.testing.assert_allclose(layer(x_TD), alone_TD, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "make_optimizer,peak",
    [
        sets.thorough(keras.optimizers.Adam, 0.01),
        pytest.param(keras.optimizers.SGD, 0.1, marks=pytest.mark.slow),
    ],
)
def test_thresholds_reach_the_quantiles_of_a_fixed_gate(make_optimizer, peak):
    # p = k / n = 1/4 of the tokens should pass. In a batch of B = 2048 the
    # number that passes the right threshold strays from p B by a relative
    # sqrt((1 - p) / (p B)) = 3.8 %; the learning rate falls to 0 over 300
    # batches, which averages that over some tens of them: below 1 %. The
    # 100,000 tokens of the check stray by sqrt(3 / 100,000) = 0.55 %. 5 % is
    # thus several standard errors away for each of the 8 experts.
    num_experts, k, width, batch, steps = 8, 2, 6, 2048, 300
    layer = moe.SparseMoE(num_experts, 2, gating="batchwise", k=k, name="moe")
    layer.build((None, width))
    layer.router.gate_DE.assign(draw(5, width, num_experts))
    layer.router.gate_DE.trainable = False
    layer.experts.trainable = False
    # The gradient of SGD counts tokens: 0.001, the loss's weight, times up to
    # B of them, so a rate of 0.1 moves a threshold by 0.2 at most.
    optimizer = make_optimizer(
        keras.optimizers.schedules.CosineDecay(peak, steps)
    )
    model = keras.Sequential([layer])
    model.compile(optimizer, "mse", jit_compile=False)
    batches = tf.data.Dataset.range(steps).map(
        lambda i: tf.random.stateless_normal((batch, width), (i, 7))
    )
    model.fit(batches.map(lambda x: (x, tf.zeros_like(x))), verbose=0)
    np.testing.assert_array_equal(
        layer.router.gate_DE, draw(5, width, num_experts).astype("float32")
    )

    x_TD = draw(11, 100_000, width).astype("float32")
    layer(x_TD)
    p = k / num_experts
    np.testing.assert_allclose(
        layer.balance.assigned_E, p * len(x_TD), rtol=0.05
    )
    score_TE = reference.scores(x_TD, np.asarray(layer.router.gate_DE))
    low_E, high_E = np.quantile(score_TE, [1 - 1.05 * p, 1 - 0.95 * p], axis=0)
    threshold_E = np.asarray(layer.router.threshold_E)
    assert ((low_E < threshold_E) & (threshold_E < high_E)).all()
    # The scores differ between experts, so the start, 1 / n, was not it.
    start_E = (score_TE > 1 / num_experts).mean(0) / p
    assert np.abs(start_E - 1).max() > 0.2


def test_each_expert_takes_its_tokens_with_the_largest_scores():
    # Worked by hand. Columns: expert 0 ranks tokens 2, 0, 1, 3, expert 1 the
    # other way round; each takes m = ceil(1 * 4 / 2) = 2 of them.
    layer = logits_layer("expert_choice", k=1, dtype="float64")
    logit_T = np.log([3.0, 1.0, 4.0, 1 / 3])
    x_TD = np.stack([logit_T, np.zeros(4)], axis=1)
    gates = layer(x_TD).gates
    # Scores of expert 0: 3/4, 1/2, 4/5, 1/4.
    np.testing.assert_array_equal(gates.expert_TK, [[0], [1], [0], [1]])
    np.testing.assert_allclose(
        gates.weight_TK, [[3 / 4], [1 / 2], [4 / 5], [3 / 4]]
    )


def test_expert_choice_depends_on_the_batch_as_documented():
    layer = layer_of("expert_choice", 4, 1)
    x_TD = draw(0, 8, 6)
    gates_TE, chosen_TE = oracle(layer, x_TD, training=False)
    assert (chosen_TE.sum(1) == 0).any() and (chosen_TE.sum(1) > 1).any()
    # Alone, a token goes to all: m = ceil(1 * 1 / 4) = 1 for each expert.
    layer(x_TD[:1])
    np.testing.assert_array_equal(layer.balance.assigned_E, np.ones(4))
    assert moe_reference.cv_squared(gates_TE.sum(0)) > 0
    layer(x_TD, training=True)
    assert not layer.losses  # balanced without one
