"""Strictly balanced gating in two levels, appendices B and F."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from moe_tf.layers import moe
from moe_tf.models import layer_specs
from moe_tf.routing import hierarchical_batchwise
from tests import finite_differences
from tests import keras_contract
from tests import sets
from tests.reference import batchwise as flat_reference
from tests.reference import hierarchical_batchwise as reference


class HierarchicalBatchwiseTest(keras_contract.TestCase):
    def test_contract_of_the_router(self):
        self.run_layer_test(
            hierarchical_batchwise.HierarchicalBatchwiseRouter,
            init_kwargs={
                "branching": (3, 4),
                "k": 1,
                "importance_weight": 0.3,
                "threshold_weight": 0.2,
            },
            input_shape=(6, 8),
            expected_num_trainable_weights=4,
            expected_num_losses=0,
            supports_masking=True,
            run_training_check=False,
            run_mixed_precision_check=False,  # float32 by design
            call_kwargs={"training": True},
        )

    @pytest.mark.thorough
    def test_contract_of_the_layer(self):  # trains too, and is saved
        self.run_layer_test(
            moe.SparseMoE,
            init_kwargs={
                "num_experts": 12,
                "hidden_units": 6,
                "branching": [3, 4],
                "gating": "batchwise",
            },
            input_shape=(2, 3, 8),
            expected_output_shape=(2, 3, 8),
            expected_num_trainable_weights=6,
            expected_num_non_trainable_weights=0,
            expected_num_losses=2,
            supports_masking=True,
            call_kwargs={"training": True},
        )


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def layer_of(branching, k, width=6, dtype="float64", num_groups=None, **kwargs):
    """A layer with gates, and with thresholds that differ."""
    router = hierarchical_batchwise.HierarchicalBatchwiseRouter(
        branching, k=k, dtype=dtype, **kwargs
    )
    layer = moe.SparseMoE(
        math.prod(branching), 7, gating=router, num_groups=num_groups,
        dtype=dtype,
    )  # fmt: skip
    layer.build((None, width))
    rng = np.random.default_rng(5)
    for variable in router.trainable_variables:
        value = rng.normal(size=variable.shape)
        if variable.name.endswith("thresholds"):
            value = rng.uniform(0.3, 1.5, variable.shape) / variable.shape[-1]
        variable.assign(value)
    return layer


def oracle(layer, x_TD, training, mask_T=None):
    router = layer.router
    gates, thresholds = (
        [np.asarray(variable, "float64") for variable in pair]
        for pair in (
            (router.primary_gate_DP, router.secondary_gate_PDQ),
            (router.threshold_P, router.threshold_PQ),
        )
    )
    return reference.route(x_TD, gates, thresholds, router.k, training, mask_T)


# (branching, k, tokens, masked): shares whole, not whole, all groups, all
# experts of a group, one group, and tokens that no group or no expert takes.
SIZES = [
    ((3, 4), 2, 24, False),
    ((2, 5), 2, 11, True),
    ((3, 2), 2, 7, True),
    ((1, 4), 1, 9, False),
    ((4, 3), 1, 29, True),
]


@pytest.mark.parametrize(
    "jit_compile", [False, pytest.param(True, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "branching,k,num_tokens,masked", sets.split(SIZES, SIZES[:2])
)
def test_matches_the_numpy_oracle(
    branching, k, num_tokens, masked, jit_compile
):
    layer = layer_of(branching, k)
    x_TD = draw(0, num_tokens, 6)
    mask_T = np.arange(num_tokens) % 3 > 0 if masked else None
    num_real = mask_T.sum() if masked else num_tokens

    @tf.function(jit_compile=jit_compile)
    def both_ways(x_TD):
        y_TD = layer(x_TD, mask=mask_T)
        evaluated = [tf.identity(v.value) for v in layer.balance.vectors]
        return y_TD, layer(x_TD, mask=mask_T, training=True), evaluated

    *outputs, evaluated = both_ways(tf.constant(x_TD))
    assert layer.balance.vectors[2] is layer.balance.assigned_E
    for y_TD, vectors, training in zip(
        outputs, (evaluated, layer.balance.vectors), (False, True), strict=True
    ):
        gate_TPQ, chosen_TPQ, _, _ = oracle(layer, x_TD, training, mask_T)
        gate_TE = gate_TPQ.reshape(num_tokens, -1)
        kernels = map(np.asarray, layer.experts.trainable_variables)
        want_TD = flat_reference.mixture(x_TD, gate_TE, *kernels)
        np.testing.assert_allclose(y_TD, want_TD, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(vectors[0], gate_TE.sum(0), rtol=1e-6)
        count_E = np.asarray(vectors[2])
        np.testing.assert_array_equal(count_E, chosen_TPQ.sum(0).ravel())
        without_T = ~chosen_TPQ.any((1, 2))
        np.testing.assert_array_equal(y_TD.numpy()[without_T], 0.0)
        if training:  # m_Q of the m_P tokens of each group
            m = math.ceil(k * math.ceil(k * num_real / branching[0])
                          / branching[1])  # fmt: skip
            np.testing.assert_array_equal(count_E, m)
            assert (
                layer.router.max_tokens_per_expert(num_real, training=True) == m
            )
            if branching == (4, 3):
                assert without_T[mask_T].any()


@sets.JIT_COMPILE
@pytest.mark.parametrize("masked", [sets.thorough(False), True])
def test_the_threshold_loss_counts_tokens_at_both_levels(masked, jit_compile):
    # dL/dT = -(tokens that pass T - m), in whole numbers; nothing for the
    # gates, nothing for x.
    weight = 0.25
    layer = layer_of(
        (3, 4), 2, importance_weight=0.0, threshold_weight=weight
    )  # fmt: skip
    router = layer.router
    x_TD = draw(0, 17, 6)
    mask_T = np.arange(17) % 4 > 0 if masked else None

    @tf.function(jit_compile=jit_compile)
    def step(x_TD):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x_TD)
            layer(x_TD, mask=mask_T, training=True)
            (loss,) = layer.losses
        gates = router.primary_gate_DP.value, router.secondary_gate_PDQ.value
        assert tape.gradient(loss, [*gates, x_TD]) == [None, None, None]
        thresholds = router.threshold_P.value, router.threshold_PQ.value
        return loss, tape.gradient(loss, thresholds)

    loss, gradients = step(tf.constant(x_TD))
    *_, want, excesses = oracle(layer, x_TD, True, mask_T)
    assert want > 0
    assert float(loss) == pytest.approx(weight * want, rel=1e-9)
    reported = layer.balance.latest()["threshold_loss"]
    assert float(reported) == pytest.approx(want, rel=1e-6)
    for gradient, excess in zip(gradients, excesses, strict=True):
        assert excess.any()
        np.testing.assert_array_equal(gradient, -weight * excess)
    layer(x_TD, mask=mask_T)  # where the thresholds themselves choose
    assert float(layer.balance.latest()["threshold_loss"]) == 0.0


@pytest.mark.thorough
@pytest.mark.parametrize(
    "jit_compile", [False, pytest.param(True, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "num_groups,masked", [(None, True), sets.slow(3, False)]
)
def test_gradients_match_finite_differences(num_groups, masked, jit_compile):
    # Of the task and the importance, through both gates. Equation 20 has a
    # test of its own.
    layer = layer_of(
        (3, 4),
        2,
        num_groups=num_groups,
        importance_weight=0.5,
        threshold_weight=1e-15,
    )
    mask_T = np.arange(12) % 4 > 0 if masked else None
    gradients = finite_differences.check(
        layer,
        draw(0, 12, 6),
        mask_T,
        jit_compile,
        leave_out=["primary_thresholds", "secondary_thresholds"],
    )
    assert all(map(np.any, gradients))


def test_groups_of_tokens_are_routed_apart():
    # With groups all secondary gates are computed, alone those of chosen
    # groups: the two ways give the same.
    whole, alone = (layer_of((4, 2), 1, num_groups=n) for n in (3, None))
    alone.set_weights(whole.get_weights())
    x_TD, mask_T = draw(0, 33, 6), np.arange(33) % 5 > 0
    assigned_E, loss = 0.0, 0.0
    y_TD = whole(x_TD, mask=mask_T, training=True)
    for part in np.split(np.arange(33), 3):
        part_TD = alone(x_TD[part], mask=mask_T[part], training=True)
        np.testing.assert_allclose(y_TD.numpy()[part], part_TD, rtol=1e-9)
        assigned_E = assigned_E + np.array(alone.balance.assigned_E)
        loss += float(alone.balance.latest()["threshold_loss"])
    np.testing.assert_array_equal(whole.balance.assigned_E, assigned_E)
    reported = float(whole.balance.latest()["threshold_loss"])
    assert reported == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("num_groups", [None, sets.thorough(2)])
def test_what_masked_tokens_hold_does_not_matter(num_groups):
    layer = layer_of((3, 4), 2, num_groups=num_groups)
    x_TD, mask_T = draw(0, 20, 6), np.arange(20) % 3 > 0
    seen = []
    for filling in (0.0, np.nan, 1e30):
        filled_TD = np.where(mask_T[:, None], x_TD, filling)
        for training in (False, True):
            y_TD = layer(filled_TD, mask=mask_T, training=training)
            np.testing.assert_array_equal(y_TD.numpy()[~mask_T], 0.0)
            numbers = [float(v) for v in layer.balance.latest().values()]
            vectors = [np.array(v) for v in layer.balance.vectors]
            seen.append([y_TD.numpy(), numbers, *vectors])
    for want, got in ((seen[i % 2], seen[i]) for i in range(2, 6)):
        for one, other in zip(want, got, strict=True):
            np.testing.assert_array_equal(other, one)


@pytest.mark.thorough
@sets.JIT_COMPILE
def test_a_broken_token_shows_and_stays_alone(jit_compile):
    layer = layer_of((3, 4), 2)
    others = np.arange(9) != 3

    @tf.function(jit_compile=jit_compile)
    def both_ways(x_TD):
        evaluated_TD = layer(x_TD)
        trained_TD = layer(x_TD, training=True)
        return evaluated_TD, trained_TD, tf.stack(layer.losses)

    want_TD, *_ = both_ways(tf.constant(draw(0, 9, 6)))
    for bad in (np.nan, np.inf):
        x_TD = draw(0, 9, 6)
        x_TD[3, 2] = bad
        evaluated_TD, trained_TD, losses = both_ways(tf.constant(x_TD))
        for y_TD in (evaluated_TD.numpy(), trained_TD.numpy()):
            assert np.isnan(y_TD[3]).all()
            assert np.isfinite(y_TD[others]).all()
        np.testing.assert_allclose(
            evaluated_TD.numpy()[others], want_TD.numpy()[others], rtol=1e-9
        )
        assert np.isnan(losses).all()


@pytest.mark.slow
def test_thresholds_reach_the_quantiles_of_fixed_gates():
    # 4096 tokens a batch: 2048 to each group, 1024 to each expert, which
    # stray by sqrt(1 / 2 / 1024) = 2.2 %, less over the last tens of batches
    # as the learning rate falls; a secondary threshold also follows what its
    # primary one lets through. 10 % is several standard errors.
    branching, width, batch, steps = (4, 4), 6, 4096, 250
    layer = layer_of(branching, 2, dtype="float32")
    for variable in layer.router.trainable_variables:
        if variable.name.endswith("thresholds"):
            variable.assign(np.full(variable.shape, 1 / variable.shape[-1]))
        else:
            variable.assign(0.5 * draw(7, *variable.shape))
            variable.trainable = False
    layer.experts.trainable = False
    tested_TD = draw(11, 40_000, width).astype("float32")
    layer(tested_TD)
    want = 40_000 * 4 / 16
    start_E = np.array(layer.balance.assigned_E) / want
    model = keras.Sequential([layer])
    rate = keras.optimizers.schedules.CosineDecay(0.01, steps)
    model.compile(keras.optimizers.Adam(rate), "mse", jit_compile=False)
    batches = tf.data.Dataset.range(steps).map(
        lambda i: tf.random.stateless_normal((batch, width), (i, 7))
    )
    model.fit(batches.map(lambda x: (x, tf.zeros_like(x))), verbose=0)
    layer(tested_TD)
    share_E = np.array(layer.balance.assigned_E) / want
    np.testing.assert_allclose(share_E, 1.0, atol=0.1)
    assert np.abs(start_E - 1).max() > 0.2  # the start was not it


@pytest.mark.parametrize("masked", [False, True])
def test_only_the_gates_of_chosen_branches_are_computed(masked):
    router = hierarchical_batchwise.HierarchicalBatchwiseRouter((8, 16))
    router.build((None, 32))
    mask_T = tf.constant(np.arange(100) % 3 > 0) if masked else None

    @tf.function
    def route(x_TD):
        return router(x_TD, mask=mask_T, training=True).gates.weight_TK

    graph = route.get_concrete_function(tf.TensorSpec((100, 32))).graph
    kinds = ("MatMul", "BatchMatMulV2", "Einsum")
    products = [op for op in graph.get_operations() if op.type in kinds]
    secondary = [op for op in products if op.outputs[0].shape[-1] == 16]
    assert (len(products), len(secondary)) == (1 + 8, 8)
    # Rows of a secondary product are those that chose its group: split by it.
    assert all(op.inputs[0].op.type == "SplitV" for op in secondary)


@pytest.mark.parametrize("gating", ["noisy_top_k", "batchwise"])
def test_weights_are_as_many_as_described(gating):
    layer = moe.SparseMoE(12, 5, 2, branching=(3, 4), gating=gating)
    layer.build((None, 6))
    described = layer_specs.Experts(12, 5, 2, (3, 4), gating)
    shapes = layer_specs.layer_shapes(described, 6)
    assert layer.count_params() == sum(map(math.prod, shapes))
    got = [tuple(weight.shape) for weight in layer.trainable_weights]
    assert sorted(got) == sorted(shapes)


def test_starts_as_one_level_does():
    router = hierarchical_batchwise.HierarchicalBatchwiseRouter((20, 30))
    router.build((None, 400))
    for kernel in (router.primary_gate_DP, router.secondary_gate_PDQ):
        assert np.std(kernel) == pytest.approx((0.1 / 400) ** 0.5, rel=0.05)
    np.testing.assert_allclose(router.threshold_P, 1 / 20)
    np.testing.assert_allclose(router.threshold_PQ, 1 / 30)


@pytest.mark.parametrize(
    "message,kwargs",
    [
        ("product.*branching=.3, 5.*num_experts=12", {"branching": (3, 5)}),
        ("`k` must be at most.*k=4", {"k": 4}),
        ("`load_weight` has no meaning", {"load_weight": 0.1}),
        ("`z_loss_weight` has no meaning", {"z_loss_weight": 0.1}),
        ("`branching` is for.*or batchwise", {"gating": "expert_choice"}),
    ],
)
def test_bad_arguments_name_the_field(message, kwargs):
    kwargs = {"gating": "batchwise", "branching": (3, 4), **kwargs}
    with pytest.raises(ValueError, match=message):
        moe.SparseMoE(12, 5, **kwargs)


def test_bad_arguments_of_the_router_name_the_field():
    make = hierarchical_batchwise.HierarchicalBatchwiseRouter
    for name, value in (
        ("threshold_weight", 0.0),
        ("load_weight", 0.1),
        ("z_loss_weight", 0.1),
    ):
        with pytest.raises(ValueError, match=f"`{name}`.*Received: {name}="):
            make((3, 4), **{name: value})
