import math

import numpy as np
import pytest
import tensorflow as tf

from moe_tf.routing import gating
from tests import sets
from tests.reference import batchwise
from tests.reference import moe as reference

SIZES = [(2, 1), (4, 2), (5, 5), (64, 4)]


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def route(noisy_TE, k, mask_T=None):
    gates, _ = gating.noisy_top_k(noisy_TE, k)
    return gating.mask_gates(gates, noisy_TE.shape[-1], mask_T)


def dense(gates, num_experts):
    weight_TK, expert_TK = np.asarray(gates[0]), np.asarray(gates[1])
    weight_TE = np.zeros((len(weight_TK), num_experts + 1))
    for t, (weight_K, expert_K) in enumerate(
        zip(weight_TK, expert_TK, strict=True)
    ):
        weight_TE[t, expert_K] += weight_K
    return weight_TE[:, :num_experts]


@pytest.mark.parametrize("num_experts,k", SIZES)
def test_gates_match_one_token_at_a_time(num_experts, k):
    noisy_TE = draw(0, 7, num_experts)
    got_TE = dense(route(noisy_TE, k), num_experts)
    want_TE = [reference.gates_of_token(noisy_E, k) for noisy_E in noisy_TE]
    np.testing.assert_allclose(got_TE, want_TE, rtol=1e-6, atol=1e-12)
    assert ((got_TE > 0).sum(-1) == k).all()


def test_ties_choose_k_experts_with_equal_weights():
    gates = route(np.zeros((3, 6)), 4)
    np.testing.assert_allclose(gates.weight_TK, np.full((3, 4), 0.25))
    for expert_K in np.asarray(gates.expert_TK):
        assert len(set(expert_K)) == 4


def test_masked_tokens_have_no_expert_and_count_nowhere():
    mask_T = np.array([True, False, True, False])
    noisy_TE = draw(0, 4, 5)
    noisy_TE[1] = np.nan
    gates = route(noisy_TE, 2, mask_T)
    alone = route(noisy_TE[mask_T], 2)
    assert (np.asarray(gates.expert_TK)[~mask_T] == 5).all()
    assert (np.asarray(gates.weight_TK)[~mask_T] == 0).all()
    for count in (gating.importance, gating.count_assigned):
        np.testing.assert_allclose(count(gates, 5), count(alone, 5))


@pytest.mark.parametrize("num_experts,k", [(2, 1), (4, 2), (16, 4)])
def test_load_probability_matches_the_definition(num_experts, k):
    clean_TE, std_TE = draw(0, 9, num_experts), np.exp(draw(1, 9, num_experts))
    noisy_TE = clean_TE + std_TE * draw(2, 9, num_experts)
    top, _ = gating.top_k_and_next(noisy_TE, k)
    got_TE = gating.load_probability(clean_TE, noisy_TE, std_TE, top)
    want_TE = [
        reference.load_of_token(*rows, k)
        for rows in zip(clean_TE, noisy_TE, std_TE, strict=True)
    ]
    np.testing.assert_allclose(got_TE, want_TE, rtol=1e-6, atol=1e-9)


def test_load_probability_is_the_share_of_fresh_draws_that_choose_the_expert():
    # Equation 8 by its words: redraw the noise of one component, keep the
    # noise of the others, and count how often that expert is among the k.
    num_experts, k, num_draws = 6, 2, 20_000
    clean_E, std_E = draw(0, num_experts), np.exp(0.3 * draw(1, num_experts))
    noisy_E = clean_E + std_E * draw(2, num_experts)
    top, _ = gating.top_k_and_next(noisy_E[None], k)
    got_E = gating.load_probability(
        clean_E[None], noisy_E[None], std_E[None], top
    )[0]
    for i in range(num_experts):
        redrawn = np.tile(noisy_E, (num_draws, 1))
        redrawn[:, i] = clean_E[i] + std_E[i] * draw(10 + i, num_draws)
        rank = (redrawn > redrawn[:, i, None]).sum(-1)
        share = (rank < k).mean()
        # Five standard errors of a share of 20,000 draws.
        tolerance = 5 * np.sqrt(0.25 / num_draws)
        assert float(got_E[i]) == pytest.approx(share, abs=tolerance)


def test_load_probabilities_sum_to_k_on_average():
    num_experts, k, num_tokens = 8, 3, 20_000
    clean_TE = np.tile(draw(0, num_experts), (num_tokens, 1))
    std_TE = np.full_like(clean_TE, 0.7)
    noisy_TE = clean_TE + std_TE * draw(1, num_tokens, num_experts)
    top, _ = gating.top_k_and_next(noisy_TE, k)
    chance_TE = gating.load_probability(clean_TE, noisy_TE, std_TE, top)
    mean = float(tf.reduce_sum(chance_TE)) / num_tokens
    assert mean == pytest.approx(k, abs=0.02)


def test_load_probability_has_a_gradient_for_experts_not_chosen():
    # A threshold in other units than the logits (taken after a softmax, say)
    # would still train; its gradient would not match finite differences.
    clean_TE, std_TE = draw(0, 3, 5), np.exp(draw(1, 3, 5))
    noise_TE = draw(2, 3, 5)

    def load(clean_TE, std_TE):
        noisy_TE = clean_TE + std_TE * noise_TE
        top, _ = gating.top_k_and_next(noisy_TE, 2)
        chance_TE = gating.load_probability(clean_TE, noisy_TE, std_TE, top)
        return tf.reduce_sum(tf.square(tf.reduce_sum(chance_TE, axis=0)))

    got, want = tf.test.compute_gradient(
        load, [tf.constant(clean_TE), tf.constant(std_TE)], delta=1e-6
    )
    for got_array, want_array in zip(got, want, strict=True):
        np.testing.assert_allclose(got_array, want_array, rtol=1e-5, atol=1e-7)
        assert (np.abs(got_array) > 0).all()


def test_vanishing_noise_gives_counts_and_finite_gradients():
    clean_TE = tf.constant(draw(0, 4, 5), tf.float32)
    std_TE = tf.zeros_like(clean_TE)
    with tf.GradientTape() as tape:
        tape.watch([clean_TE, std_TE])
        top, _ = gating.top_k_and_next(clean_TE, 2)
        chance_TE = gating.load_probability(clean_TE, clean_TE, std_TE, top)
        total = tf.reduce_sum(tf.square(chance_TE))
    np.testing.assert_allclose(tf.reduce_sum(chance_TE, axis=-1), 2.0)
    for gradient in tape.gradient(total, [clean_TE, std_TE]):
        assert np.isfinite(gradient).all()


def both_ways(function, *arguments):
    """What a function returns in a graph, without XLA and with it."""
    arguments = [tf.constant(argument) for argument in arguments]
    return [
        tf.nest.map_structure(
            np.asarray, tf.function(function, jit_compile=jit)(*arguments)
        )
        for jit in (False, True)
    ]


@pytest.mark.parametrize("masked", [sets.thorough(False), True])
@pytest.mark.parametrize(
    "num_tokens,num_experts,m", [(7, 3, 2), (7, 3, 5), (4, 1, 4), (5, 20, 0)]
)
def test_batchwise_mask_matches_the_definition(
    num_tokens, num_experts, m, masked
):
    score_TE = np.round(draw(0, num_tokens, num_experts), 1)  # ties too
    mask_T = np.arange(num_tokens) != 1 if masked else np.ones(num_tokens, bool)
    m = min(m, mask_T.sum())
    want_TE = batchwise.batchwise_mask(score_TE, m, mask_T)
    most = min(m + 1, num_tokens)  # as if padding had been counted

    def choose(score_TE):
        return gating.batchwise_mask(score_TE, m, most, mask_T)

    for got_TE in both_ways(choose, score_TE):
        np.testing.assert_array_equal(got_TE, want_TE)
    assert (want_TE.sum(0) == m).all()


def test_batchwise_mask_takes_nan_first_and_no_masked_token():
    score_TE = np.array([[0.9], [0.1], [np.nan], [0.5]])
    mask_T = np.array([False, True, True, True])

    def choose(score_TE):
        return gating.batchwise_mask(score_TE, 2, 3, mask_T)

    for chosen_TE in both_ways(choose, score_TE):
        np.testing.assert_array_equal(
            chosen_TE, [[False], [False], [True], [True]]
        )


def reference_scores(num_tokens, num_experts):
    return batchwise.scores(draw(3, num_tokens, 2), draw(4, 2, num_experts))


def test_renormalised_scores_sum_to_1_or_0_with_finite_gradients():
    score_TE = reference_scores(4, 3)
    logits_TE = np.log(score_TE)
    chosen_TE = np.array([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]], bool)
    got_TE = gating.softmax_over_chosen(tf.constant(logits_TE), chosen_TE)
    np.testing.assert_allclose(
        got_TE, batchwise.renormalised(score_TE, chosen_TE), rtol=1e-12
    )
    np.testing.assert_allclose(np.sum(got_TE, axis=1), [1, 0, 1, 1])
    weight_TE = draw(5, 4, 3)
    got, want = tf.test.compute_gradient(
        lambda logits_TE: (
            gating.softmax_over_chosen(logits_TE, chosen_TE) * weight_TE
        ),
        [tf.constant(logits_TE)],
        delta=1e-6,
    )
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-8)


def test_gates_of_a_dense_table_keep_every_choice_in_order():
    weight_TE = draw(0, 4, 5)
    chosen_TE = np.zeros((4, 5), bool)
    chosen_TE[1] = True
    chosen_TE[2, [1, 4]] = True
    for most, row in ((5, 2), (5, 1), (5, 0)):
        gates = gating.gates_of_chosen(weight_TE, chosen_TE, most)
        used = np.flatnonzero(chosen_TE[row])
        want = np.concatenate([used, np.full(most - len(used), 5)])
        np.testing.assert_array_equal(gates.expert_TK[row], want)
    np.testing.assert_allclose(dense(gates, 5), weight_TE * chosen_TE)


def test_ties_go_to_the_first_expert_with_and_without_xla():
    for top, expert_TK in both_ways(
        lambda logits_TE: gating.top_k_and_next(logits_TE, 2),
        np.array([[1.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]]),
    ):
        np.testing.assert_array_equal(expert_TK, [[1, 2], [0, 1]])
        np.testing.assert_array_equal(top, [[2, 2, 2], [0, 0, 0]])


@pytest.mark.parametrize("num_experts,k", [(5, 2), (3, 3), (2, 1)])
def test_no_finite_logit_is_too_large(num_experts, k):
    clean_TE = 1e30 * draw(0, 6, num_experts).astype("float32")
    for gates in both_ways(
        lambda clean_TE: gating.noisy_top_k(clean_TE, k)[0], clean_TE
    ):
        np.testing.assert_allclose(np.sum(gates.weight_TK, -1), 1.0, rtol=1e-6)
        np.testing.assert_array_equal(
            gates.expert_TK, np.argsort(-clean_TE, axis=-1)[:, :k]
        )


@pytest.mark.parametrize("z", [-30.0, -2.0, 0.0, 0.5, 30.0])
def test_normal_cdf(z):
    want = 0.5 * math.erfc(-z / math.sqrt(2.0))
    got = float(gating.normal_cdf(np.float64(z)))
    assert got == pytest.approx(want, abs=1e-15)
