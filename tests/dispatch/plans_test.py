import hypothesis
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies as st

from moe_tf.dispatch import capacity
from moe_tf.dispatch import plans


def plan_of(way, expert_TK, num_experts, size):
    if way == "rows":
        return plans.plan_rows(expert_TK, num_experts)
    if way == "blocks":
        return plans.plan_blocks(expert_TK, num_experts, size)
    return plans.plan_capacity(
        expert_TK,
        num_experts,
        capacity.expert_capacity(expert_TK.size, num_experts, size / 2),
        limit_of(way, expert_TK, num_experts, size),
    )


def limit_of(way, expert_TK, num_experts, size):
    """The most assignments that an expert takes, by whole numbers."""
    if way != "capacity":
        return expert_TK.size
    num_real = int((expert_TK < num_experts).sum())
    return -(-size * num_real // (2 * num_experts))


@st.composite
def routings(draw):
    """Expert ids of some tokens; `num_experts` stands for a masked token."""
    num_experts = draw(st.integers(1, 6))
    num_tokens = draw(st.integers(1, 9))
    k = draw(st.integers(1, num_experts))
    rows = []
    for _ in range(num_tokens):
        if draw(st.integers(0, 4)) == 0:
            rows.append([num_experts] * k)
        else:
            rows.append(draw(st.permutations(range(num_experts)))[:k])
    return np.array(rows, "int32"), num_experts


def kept(expert_TK, num_experts, limit):
    """Which assignments fit if each expert takes the first `limit`."""
    taken = np.zeros(num_experts + 1, int)
    keep_TK = np.zeros(expert_TK.shape, bool)
    for t, expert_K in enumerate(expert_TK):
        for j, expert in enumerate(expert_K):
            keep_TK[t, j] = expert < num_experts and taken[expert] < limit
            taken[expert] += 1
    return keep_TK


@pytest.mark.parametrize("way", ["rows", "blocks", "capacity"])
@hypothesis.settings(max_examples=10, deadline=None)
@hypothesis.given(routing=routings(), size=st.integers(1, 4))
def test_every_kept_assignment_is_computed_once_by_its_expert(
    way, routing, size
):
    expert_TK, num_experts = routing
    num_tokens, k = expert_TK.shape
    plan = plan_of(way, expert_TK, num_experts, size)
    limit = limit_of(way, expert_TK, num_experts, size)
    keep_TK = kept(expert_TK, num_experts, limit)

    x_TD = np.arange(1.0, num_tokens + 1)[:, None] * np.array([[1.0, 10.0]])
    x_SD = plan.dispatch(tf.constant(x_TD)).numpy()
    slot_TK = np.asarray(plan.slot_TK)
    used = []
    for t, j in zip(*np.nonzero(keep_TK), strict=True):
        slot = slot_TK[t, j]
        np.testing.assert_array_equal(x_SD[slot], x_TD[t])
        used.append(slot)
        if way != "rows":
            expert_N = getattr(plan, "expert_N", np.arange(num_experts))
            block = slot // (len(x_SD) // len(expert_N))
            assert expert_N[block] == expert_TK[t, j]
    assert len(set(used)) == len(used)
    if way == "rows":  # slots lie expert by expert
        expert_S = np.sort(expert_TK, axis=None)
        assert (expert_S[used] == expert_TK[keep_TK]).all()
    else:  # what nobody uses is zero
        unused = np.setdiff1d(np.arange(len(x_SD)), used)
        assert (x_SD[unused] == 0).all()
        assert (slot_TK[~keep_TK] == len(x_SD)).all()
    count_E = np.bincount(expert_TK.ravel(), minlength=num_experts + 1)[:-1]
    np.testing.assert_array_equal(plan.count_E, count_E)
    real_TK = expert_TK < num_experts
    lost = expert_TK[real_TK & ~keep_TK]
    np.testing.assert_array_equal(
        plan.dropped_E(),
        np.bincount(lost, minlength=num_experts)
        if way != "rows"
        else np.zeros(num_experts),
    )


@pytest.mark.parametrize("way", ["rows", "blocks", "capacity"])
@hypothesis.settings(max_examples=12, deadline=None)
@hypothesis.given(routing=routings(), size=st.integers(1, 4))
def test_combine_of_dispatch_and_its_gradients(way, routing, size):
    expert_TK, num_experts = routing
    plan = plan_of(way, expert_TK, num_experts, size)
    real_TK = expert_TK < num_experts
    limit = limit_of(way, expert_TK, num_experts, size)
    keep_TK = kept(expert_TK, num_experts, limit)
    rng = np.random.default_rng(0)
    x_TD = tf.constant(rng.normal(size=(len(expert_TK), 3)))
    weight_TK = tf.constant(rng.normal(size=expert_TK.shape))

    def double(x_TD, weight_TK):
        x_SD = plan.dispatch(x_TD)
        # Masked tokens come with zero weights.
        return plan.combine(x_SD * x_SD, weight_TK * real_TK)

    with tf.GradientTape() as tape:
        tape.watch([x_TD, weight_TK])
        y_TD = double(x_TD, weight_TK)
    dy_TD = rng.normal(size=x_TD.shape)
    dx_TD, dweight_TK = tape.gradient(
        y_TD, [x_TD, weight_TK], output_gradients=tf.constant(dy_TD)
    )
    # By hand: y = x^2 times the sum of the weights that are kept.
    x_TD = x_TD.numpy()
    sum_T1 = (weight_TK.numpy() * keep_TK).sum(-1, keepdims=True)
    np.testing.assert_allclose(y_TD, sum_T1 * x_TD**2, atol=1e-12)
    np.testing.assert_allclose(dx_TD, 2 * sum_T1 * x_TD * dy_TD, atol=1e-12)
    slope_T1 = (x_TD**2 * dy_TD).sum(-1, keepdims=True)
    np.testing.assert_allclose(dweight_TK, slope_T1 * keep_TK, atol=1e-12)


@pytest.mark.parametrize("way", ["rows", "blocks", "capacity"])
def test_gradients_scatter_no_activation(way):
    expert_TK = np.array([[0, 1], [1, 2], [2, 0]], "int32")

    @tf.function
    def gradients(x_TD, weight_TK):
        plan = plan_of(way, expert_TK, num_experts=3, size=2)
        with tf.GradientTape() as tape:
            tape.watch([x_TD, weight_TK])
            y_SD = plan.dispatch(x_TD)
            y_TD = plan.combine(y_SD * y_SD, weight_TK)
        # As tensors: of a gather TensorFlow gives slices, scattered later.
        return [
            tf.convert_to_tensor(gradient)
            for gradient in tape.gradient(y_TD, [x_TD, weight_TK])
        ]

    graph = gradients.get_concrete_function(
        tf.TensorSpec((3, 4)), tf.TensorSpec((3, 2))
    ).graph
    scatters = [
        op
        for op in graph.get_operations()
        if "Scatter" in op.type or "Segment" in op.type
        if any(t.dtype.is_floating for t in op.inputs)
    ]
    assert not scatters


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize(
    "num_assignments,num_experts,factor,want",
    [
        (100, 10, 1.1, 11),
        (7, 4, 1.0, 2),
        (16, 4, 1.25, 5),
        (3, 8, 0.1, 1),
        (700, 8, 4 / 3, 117),
        (2**30, 1024, 4 / 3, 1398102),  # in int64 all the way
        (600, 2, 1 / 3, 100),
        (100, 10, np.float64(1.1), 11),
    ],
)
def test_capacity_is_the_ceiling_of_the_factor_as_written(
    static, num_assignments, num_experts, factor, want
):
    number = num_assignments if static else tf.constant(num_assignments)
    assert int(capacity.expert_capacity(number, num_experts, factor)) == want
