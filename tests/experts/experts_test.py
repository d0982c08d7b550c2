import numpy as np
import pytest
import tensorflow as tf

from moe_tf.dispatch import grouped
from moe_tf.dispatch import plans
from moe_tf.experts import experts
from tests import sets


def test_each_expert_is_initialised_by_its_own_fans():
    # glorot_uniform over (E, D, F) would count E into the fans.
    layer = experts.Experts(64, 40)
    layer.build((None, 20))
    limit = (6 / (20 + 40)) ** 0.5
    for kernel in (layer.in_EDF, layer.out_EFD):
        values = np.asarray(kernel)
        assert np.abs(values).max() <= limit
        deviation_E = values.reshape(64, -1).std(-1)
        np.testing.assert_allclose(deviation_E, limit / 3**0.5, rtol=0.15)
    assert np.abs(values[0] - values[1]).max() > 0.1


@pytest.mark.parametrize("value", [0, 2.5])
@pytest.mark.parametrize("field", ["num_experts", "hidden_units"])
def test_sizes_that_are_no_counts_are_refused(field, value):
    sizes = {"num_experts": 2, "hidden_units": 3, field: value}
    with pytest.raises(ValueError, match=f"`{field}`.* {field}={value}"):
        experts.Experts(**sizes)


@pytest.mark.parametrize("value", ["yes", None, 1])
def test_a_recompute_that_is_no_bool_is_refused(value):
    with pytest.raises(ValueError, match=f"`recompute`.* recompute={value}"):
        experts.Experts(2, 3, recompute=value)


@pytest.mark.parametrize("num_experts,k", [(4, 1), (4, 2), (3, 3)])
@pytest.mark.parametrize("num_tokens", [2, sets.thorough(3), 9])
def test_all_plans_give_the_same(num_experts, k, num_tokens):
    # Two tokens in blocks of eight make as many blocks as there are experts:
    # the block of an expert is not always at the expert's place.
    layer = experts.Experts(num_experts, 5, dtype="float64")
    layer.build((None, 6))
    rng = np.random.default_rng(0)
    x_TD = tf.constant(rng.normal(size=(num_tokens, 6)))
    weight_TK = rng.normal(size=(num_tokens, k))
    expert_TK = np.stack(
        [rng.permutation(num_experts)[:k] for _ in range(num_tokens)]
    ).astype("int32")
    every = [
        plans.plan_rows(expert_TK, num_experts),
        plans.plan_blocks(expert_TK, num_experts, 8),
        plans.plan_blocks(expert_TK, num_experts, 1),
        plans.plan_capacity(expert_TK, num_experts, k * num_tokens),
    ]
    variables = [layer.in_EDF.value, layer.out_EFD.value]
    results = []
    for plan in every:
        with tf.GradientTape() as tape:
            tape.watch(x_TD)
            y_SD = layer(plan.dispatch(x_TD), plan=plan)
            y_TD = plan.combine(y_SD, tf.constant(weight_TK))
            loss = tf.reduce_sum(tf.sin(y_TD))
        gradients = tape.gradient(loss, [x_TD, *variables])
        results.append([y_TD, *map(tf.convert_to_tensor, gradients)])
    for result in results[1:]:
        for want, got in zip(results[0], result, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("num_experts", [4, 32])
def test_work_follows_the_assignments_and_not_the_experts(num_experts):
    rows = []

    def counted(h_SF):
        rows.append(h_SF.shape[0])
        return tf.nn.relu(h_SF)

    layer = experts.Experts(num_experts, 16, activation=counted)
    rng = np.random.default_rng(0)
    expert_TK = np.stack(
        [rng.permutation(num_experts)[:2] for _ in range(64)]
    ).astype("int32")
    plan = plans.plan_rows(expert_TK, num_experts)
    layer(plan.dispatch(tf.ones((64, 8))), plan=plan)
    assert sum(rows) == 64 * 2


@pytest.mark.parametrize("graph", [False, sets.thorough(True)])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("masked", [sets.thorough(False), True])
def test_very_many_experts_run_in_a_loop(masked, recompute, graph, monkeypatch):
    layer = experts.Experts(7, 5, recompute=recompute, dtype="float64")
    layer.build((None, 6))
    rng = np.random.default_rng(0)
    x_TD = tf.constant(rng.normal(size=(9, 6)))
    weight_TK = tf.constant(rng.normal(size=(9, 2)))
    # Experts 5 and 6 have no tokens.
    expert_TK = np.stack([rng.permutation(5)[:2] for _ in range(9)])
    if masked:
        expert_TK[[2, 8]] = 7
    expert_TK = tf.constant(expert_TK, "int32")
    variables = [layer.in_EDF.value, layer.out_EFD.value]

    def step(x_TD):
        plan = plans.plan_rows(expert_TK, 7)
        with tf.GradientTape() as tape:
            tape.watch(x_TD)
            y_SD = layer(plan.dispatch(x_TD), plan=plan)
            y_TD = plan.combine(y_SD, weight_TK)
            loss = tf.reduce_sum(tf.sin(y_TD))
        gradients = tape.gradient(loss, [x_TD, *variables])
        return [y_TD, *map(tf.convert_to_tensor, gradients)]

    want = step(x_TD)
    monkeypatch.setattr(grouped, "_UNROLLED", 6)
    got = tf.function(step)(x_TD) if graph else step(x_TD)
    for array, wanted in zip(got, want, strict=True):
        np.testing.assert_allclose(array, wanted, rtol=1e-9, atol=1e-12)


def test_a_graph_of_very_many_experts_is_small(monkeypatch):
    sizes = []
    for unrolled in (6, 7):
        monkeypatch.setattr(grouped, "_UNROLLED", unrolled)
        layer = experts.Experts(7, 5)
        layer.build((None, 6))

        @tf.function
        def run(expert_TK, layer=layer):
            plan = plans.plan_rows(expert_TK, 7)
            return layer(tf.zeros((18, 6)), plan=plan)

        graph = run.get_concrete_function(tf.TensorSpec((9, 2), "int32")).graph
        kinds = [operation.type for operation in graph.get_operations()]
        sizes.append(kinds.count("MatMul"))
    assert sizes == [2, 14]  # the first are of the shape's trial run
