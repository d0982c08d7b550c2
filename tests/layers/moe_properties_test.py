"""SparseMoE over many shapes against a slow loop, and what must not matter."""

import itertools
import math

import hypothesis
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies as st

from moe_tf.dispatch import choice
from moe_tf.layers import moe
from tests import sets
from tests.reference import batchwise as reference

few = hypothesis.settings(max_examples=6, deadline=None)
WIDTH = 3


class Case:
    """A shape, and arrays for it."""

    def __init__(self, num_experts, k, mask_T, seed):
        self.num_experts, self.k, self.mask_T = num_experts, k, mask_T
        self.seed = seed
        rng = np.random.default_rng(seed)
        self.x_TD = rng.normal(size=(len(mask_T), WIDTH))
        self.dy_TD = rng.normal(size=self.x_TD.shape)

    def __repr__(self):
        mask = "".join("01"[int(real)] for real in self.mask_T)
        return f"Case({self.num_experts}, {self.k}, {mask}, {self.seed})"

    def layer(self, gating="softmax_top_k", **kwargs):
        if gating != "switch":
            kwargs["k"] = self.k
        layer = moe.SparseMoE(
            self.num_experts, 4, gating=gating, dtype="float64", **kwargs
        )
        layer.build((None, WIDTH))
        rng = np.random.default_rng(self.seed + 1)
        for variable in layer.trainable_variables:
            variable.assign(rng.normal(size=variable.shape))
        if gating == "batchwise":
            size = self.num_experts
            layer.router.threshold_E.assign(rng.uniform(0.5, 1.2, size) / size)
        return layer


@st.composite
def cases(draw, most_experts=6, max_tokens_per_expert=9, least_tokens=1):
    num_experts = draw(st.integers(1, most_experts))
    k = draw(st.integers(1, num_experts))
    real = st.integers(0, 3).map(bool)  # three in four
    mask = draw(
        st.lists(real, min_size=least_tokens, max_size=max_tokens_per_expert)
    )
    return Case(num_experts, k, np.array(mask, bool), draw(st.integers(0, 99)))


def run(layer, x_TD, dy_TD, mask_T=None, training=False, jit_compile=None):
    """Output, losses and all gradients of `sum(dy * y) + losses`."""
    variables = [v.value for v in layer.trainable_variables]
    layer.balance.reset_state()

    def step(x_TD):
        with tf.GradientTape() as tape:
            tape.watch(x_TD)
            y_TD = layer(x_TD, mask=mask_T, training=training)
            loss = tf.reduce_sum(y_TD * dy_TD) + sum(layer.losses)
        gradients = tape.gradient(
            loss, [x_TD, *variables], unconnected_gradients="zero"
        )
        losses = tf.stack([tf.cast(loss, "float64"), *layer.losses])
        return [y_TD, losses, *map(tf.convert_to_tensor, gradients)]

    if jit_compile is not None:
        step = tf.function(step, jit_compile=jit_compile)
    return [tensor.numpy() for tensor in step(tf.constant(x_TD))]


def numbers(layer):
    scalars = {n: float(v) for n, v in layer.balance.latest().items()}
    vectors = [np.array(vector) for vector in layer.balance.vectors]
    return [np.array(list(scalars.values())), *vectors]


def slow(layer, case, kept_TE=None):
    """Value and gradients of `softmax_top_k`, token by token, by hand.

    Of the assignments that the gate makes, those in `kept_TE` count; the gate
    values are not divided again. Follows `run` without losses.
    """
    gate_DE, in_EDF, out_EFD = (v.numpy() for v in layer.trainable_variables)
    y_TD, dx_TD = np.zeros_like(case.x_TD), np.zeros_like(case.x_TD)
    dgate_DE, din_EDF, dout_EFD = map(np.zeros_like, (gate_DE, in_EDF, out_EFD))
    for t in np.flatnonzero(case.mask_T):
        x_D, dy_D = case.x_TD[t], case.dy_TD[t]
        logit_E = x_D @ gate_DE
        chosen = np.argsort(-logit_E, kind="stable")[: case.k]
        weight_K = np.exp(logit_E[chosen] - logit_E.max())
        weight_K /= weight_K.sum()
        dweight_K = np.zeros(case.k)
        for j, i in enumerate(chosen):
            if kept_TE is not None and not kept_TE[t, i]:
                continue
            before_F = x_D @ in_EDF[i]
            hidden_F = np.maximum(before_F, 0.0)
            y_TD[t] += weight_K[j] * hidden_F @ out_EFD[i]
            dweight_K[j] = hidden_F @ out_EFD[i] @ dy_D
            dhidden_F = weight_K[j] * (out_EFD[i] @ dy_D) * (before_F > 0)
            dout_EFD[i] += weight_K[j] * np.outer(hidden_F, dy_D)
            din_EDF[i] += np.outer(x_D, dhidden_F)
            dx_TD[t] += in_EDF[i] @ dhidden_F
        dlogit_K = weight_K * (dweight_K - weight_K @ dweight_K)
        dgate_DE[:, chosen] += np.outer(x_D, dlogit_K)
        dx_TD[t] += gate_DE[:, chosen] @ dlogit_K
    return y_TD, dx_TD, dgate_DE, din_EDF, dout_EFD


def assert_same(got, want):
    for got_array, want_array in zip(got, want, strict=True):
        np.testing.assert_allclose(got_array, want_array, rtol=1e-8, atol=1e-10)


def without_losses(results):
    return [results[0], *results[2:]]


@few
@hypothesis.given(case=cases(), wide=st.sampled_from([None, 20.0]))
def test_rows_and_wide_capacity_equal_the_slow_loop(case, wide):
    layer = case.layer(load_weight=0.0, capacity_factor=wide)
    got = run(layer, case.x_TD, case.dy_TD, case.mask_T, training=True)
    assert_same(without_losses(got), slow(layer, case))
    assert not np.any(layer.balance.dropped_E)


# XLA compiles each shape anew, so these are few: more experts than tokens
# need, all experts, a token without company, nothing masked and most.
COMPILED = [
    Case(6, 2, np.array([1, 1, 0, 1, 1, 0, 1, 1, 1], bool), 1),
    Case(3, 3, np.array([0, 1, 0, 0, 1], bool), 2),
    Case(4, 1, np.ones(8, bool), 3),
]


@pytest.mark.parametrize(
    "wide,case",
    sets.split(
        itertools.product((None, 20.0), COMPILED),
        [(None, COMPILED[0])],
        [(None, COMPILED[1]), (20.0, COMPILED[0]), (20.0, COMPILED[2])],
    ),
    ids=repr,
)
def test_blocks_and_capacity_under_xla_equal_the_slow_loop(wide, case):
    layer = case.layer(load_weight=0.0, capacity_factor=wide)
    got = run(layer, case.x_TD, case.dy_TD, case.mask_T, True, jit_compile=True)
    assert_same(without_losses(got), slow(layer, case))


def kept_assignments(layer, case, factor, by_value):
    """Which assignments each expert keeps, by the words of `drop_policy`."""
    logit_TE = case.x_TD @ layer.router.gate_DE.numpy()
    num_real = int(case.mask_T.sum())
    limit = math.ceil(factor * case.k * num_real / case.num_experts)
    asks = {i: [] for i in range(case.num_experts)}
    for t in np.flatnonzero(case.mask_T):
        chosen = np.argsort(-logit_TE[t], kind="stable")[: case.k]
        total = np.exp(logit_TE[t, chosen]).sum()
        for i in chosen:
            asks[i].append((np.exp(logit_TE[t, i]) / total, t))
    kept_TE = np.zeros(logit_TE.shape, bool)
    dropped_E = np.zeros(case.num_experts)
    for i, queue in asks.items():
        # Rounded so that the gate values of k = 1 tie, in any arithmetic.
        order = sorted(
            queue, key=lambda ask: (-round(ask[0], 12) * by_value, ask[1])
        )
        kept_TE[[t for _, t in order[:limit]], i] = True
        dropped_E[i] = len(order[limit:])
    return kept_TE, dropped_E, limit


def check_drops(case, factor, policy, jit_compile):
    layer = case.layer(
        load_weight=0.0, capacity_factor=factor, drop_policy=policy
    )
    by_value = policy == "gate_value"
    kept_TE, dropped_E, limit = kept_assignments(layer, case, factor, by_value)
    got = run(layer, case.x_TD, case.dy_TD, case.mask_T, True, jit_compile)
    assert_same(without_losses(got), slow(layer, case, kept_TE))
    np.testing.assert_array_equal(layer.balance.dropped_E, dropped_E)
    total = case.k * case.mask_T.sum()
    latest = layer.balance.latest()
    assert float(latest["dropped_fraction"]) == pytest.approx(
        dropped_E.sum() / max(total, 1)
    )
    assert float(latest["effective_capacity_factor"]) == pytest.approx(
        limit * case.num_experts / max(total, 1)
    )


FACTORS = st.sampled_from([0.25, 0.5, 0.75, 1.0, 1.1])


@pytest.mark.parametrize("policy", choice.DROP_POLICIES)
@few
@hypothesis.given(case=cases(least_tokens=3), factor=FACTORS)
def test_what_drops_is_what_the_policy_says(policy, case, factor):
    check_drops(case, factor, policy, jit_compile=None)


@pytest.mark.parametrize(
    "policy,case",
    sets.split(
        itertools.product(choice.DROP_POLICIES, COMPILED),
        zip(choice.DROP_POLICIES, COMPILED, strict=False),
    ),
    ids=repr,
)
def test_what_drops_under_xla_is_what_the_policy_says(policy, case):
    check_drops(case, 0.5, policy, jit_compile=True)


def test_the_two_policies_differ():
    # Two tokens for expert 0, which takes one: the first of them, or the one
    # with the larger gate value.
    case = Case(2, 2, np.ones(2, bool), 0)
    case.x_TD = np.array([[0.1, 0.0, 0.0], [2.0, 0.0, 0.0]])
    outputs = {}
    for policy in choice.DROP_POLICIES:
        layer = case.layer(capacity_factor=0.5, drop_policy=policy)
        layer.router.gate_DE.assign(np.eye(3, 2))
        keep_TE, dropped_E, limit = kept_assignments(
            layer, case, 0.5, policy == "gate_value"
        )
        assert limit == 1 and (dropped_E == 1).all()
        outputs[policy] = keep_TE
        layer(case.x_TD, training=True)
        np.testing.assert_array_equal(layer.balance.dropped_E, dropped_E)
    np.testing.assert_array_equal(outputs["position"], [[1, 1], [0, 0]])
    np.testing.assert_array_equal(outputs["gate_value"], [[0, 1], [1, 0]])


@few
@hypothesis.given(case=cases(least_tokens=4), factor=FACTORS)
def test_evaluation_clips_only_where_it_is_told_to(case, factor):
    free = case.layer(capacity_factor=factor)
    y_TD, *_ = run(free, case.x_TD, case.dy_TD, case.mask_T)
    np.testing.assert_allclose(y_TD, slow(free, case)[0], atol=1e-10)
    assert not np.any(free.balance.dropped_E)

    clipped = case.layer(eval_capacity_factor=factor)
    kept_TE, dropped_E, _ = kept_assignments(clipped, case, factor, False)
    y_TD, *_ = run(clipped, case.x_TD, case.dy_TD, case.mask_T)
    want_TD = slow(clipped, case, kept_TE)[0]
    np.testing.assert_allclose(y_TD, want_TD, atol=1e-10)
    np.testing.assert_array_equal(clipped.balance.dropped_E, dropped_E)
    run(clipped, case.x_TD, case.dy_TD, case.mask_T, training=True)
    assert not np.any(clipped.balance.dropped_E)


# With whether training is looked at too: not where noise is drawn.
WAYS = [
    ("noisy_top_k", False),
    ("softmax_top_k", True),
    ("switch", True),
    ("batchwise", True),
    ("batchwise", False),
    ("expert_choice", True),
]


@pytest.mark.parametrize(
    "gating,training,capacity_factor",
    sets.split(
        [(*way, factor) for way in WAYS for factor in (None, 0.75)],
        [(*way, (None, 0.75)[i % 2]) for i, way in enumerate(WAYS[::2])],
        [(*way, None) for way in WAYS[1::2]]
        + [(*WAYS[0], 0.75), (*WAYS[4], 0.75)],
    ),
)
@hypothesis.settings(few, max_examples=6)
@hypothesis.given(case=cases())
def test_padding_anywhere_changes_nothing(
    gating, training, capacity_factor, case
):
    layer = case.layer(
        gating,
        z_loss_weight=0.1,
        importance_weight=0.2,
        capacity_factor=capacity_factor,
        eval_capacity_factor=capacity_factor,
    )
    real = np.flatnonzero(case.mask_T)
    x_TD, dy_TD = case.x_TD[real], case.dy_TD[real]
    want = run(layer, x_TD, dy_TD, None, training)
    want_numbers = numbers(layer)

    # The same tokens among positions that hold NaN.
    x_TD = np.where(case.mask_T[:, None], case.x_TD, np.nan)
    got = run(layer, x_TD, case.dy_TD, case.mask_T, training)
    for padded in (got[0], got[2]):  # output, gradient of the input
        np.testing.assert_array_equal(padded[~case.mask_T], 0.0)
    got[0], got[2] = got[0][real], got[2][real]
    assert_same(got, want)
    for got_array, want_array in zip(numbers(layer), want_numbers, strict=True):
        np.testing.assert_allclose(got_array, want_array, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "gating,training", sets.split(WAYS, WAYS[:1], WAYS[1:4])
)
@hypothesis.settings(few, max_examples=6)
@hypothesis.given(case=cases(least_tokens=2), data=st.data())
def test_the_order_of_tokens_does_not_matter(gating, training, case, data):
    layer = case.layer(gating, importance_weight=0.2)
    order = data.draw(st.permutations(range(len(case.x_TD))))
    want = run(layer, case.x_TD, case.dy_TD, case.mask_T, training)
    got = run(
        layer,
        case.x_TD[order],
        case.dy_TD[order],
        case.mask_T[order],
        training,
    )
    want[0], want[2] = want[0][order], want[2][order]
    assert_same(got, want)


@pytest.mark.parametrize(
    "gating",
    [
        "noisy_top_k",
        *map(sets.thorough, ("softmax_top_k", "switch", "batchwise")),
    ],
)
@hypothesis.settings(few, max_examples=6)
@hypothesis.given(case=cases(least_tokens=2))
def test_alone_as_in_a_batch(gating, case):
    # The gradient of the input too; those of the weights are sums over tokens.
    layer = case.layer(gating)
    together = run(layer, case.x_TD, case.dy_TD, case.mask_T)
    total = [np.zeros_like(gradient) for gradient in together[3:]]
    for t in range(len(case.x_TD)):
        one = slice(t, t + 1)
        alone = run(layer, case.x_TD[one], case.dy_TD[one], case.mask_T[one])
        assert_same([alone[0], alone[2]], [together[0][one], together[2][one]])
        total = [sum(pair) for pair in zip(total, alone[3:], strict=True)]
    assert_same(total, together[3:])


@pytest.mark.parametrize(
    "gating,training", sets.split(WAYS, WAYS[3:4], WAYS[:3])
)
@hypothesis.settings(few, max_examples=6)
@hypothesis.given(case=cases(), data=st.data())
def test_the_names_of_the_experts_do_not_matter(gating, training, case, data):
    layer = case.layer(gating, importance_weight=0.2)
    order = list(data.draw(st.permutations(range(case.num_experts))))
    arguments = case.x_TD, case.dy_TD, case.mask_T, training
    y_TD, losses, dx_TD, *_ = run(layer, *arguments)
    vectors = numbers(layer)[1:]
    for variable in layer.trainable_variables:
        value = variable.numpy()
        by_expert = value.shape[0] == case.num_experts and len(value.shape) != 2
        variable.assign(value[order] if by_expert else value[:, order])
    assert_same(run(layer, *arguments)[:3], (y_TD, losses, dx_TD))
    for got_E, want_E in zip(numbers(layer)[1:], vectors, strict=True):
        np.testing.assert_allclose(got_E, want_E[order], rtol=1e-6)


def check_recomputing(case, factor, jit_compile):
    got, want = (
        run(
            case.layer(capacity_factor=factor, recompute=recompute),
            case.x_TD,
            case.dy_TD,
            case.mask_T,
            True,
            jit_compile,
        )
        for recompute in (True, False)
    )
    assert_same(got, want)


@few
@hypothesis.given(case=cases(), factor=st.sampled_from([None, 0.5]))
def test_recomputing_changes_nothing(case, factor):
    check_recomputing(case, factor, jit_compile=None)


@sets.JIT_COMPILE
def test_recomputing_in_a_graph_changes_nothing(jit_compile):
    check_recomputing(COMPILED[0], None, jit_compile)


@few
@hypothesis.given(case=cases())
def test_the_loop_is_the_oracle_of_the_other_tests(case):
    # The slow loop above and tests/reference agree on the value.
    layer = case.layer()
    gate_DE, *kernels = (v.numpy() for v in layer.trainable_variables)
    gate_TE = np.zeros((len(case.x_TD), case.num_experts))
    probability_TE = reference.scores(case.x_TD, gate_DE)
    for t in np.flatnonzero(case.mask_T):
        chosen = np.argsort(-probability_TE[t], kind="stable")[: case.k]
        gate_TE[t, chosen] = (
            probability_TE[t, chosen] / probability_TE[t, chosen].sum()
        )
    want_TD = reference.mixture(case.x_TD, gate_TE, *kernels)
    np.testing.assert_allclose(slow(layer, case)[0], want_TD, atol=1e-12)
