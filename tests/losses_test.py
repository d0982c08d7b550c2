import numpy as np
import pytest
import tensorflow as tf

from moe_tf import losses
from tests.reference import batchwise


def test_cv_squared_is_zero_at_balance_and_n_minus_1_at_collapse():
    assert float(losses.cv_squared(np.full(7, 3.0))) == 0.0
    collapsed = np.array([0.0, 5.0, 0.0, 0.0, 0.0])
    assert float(losses.cv_squared(collapsed)) == pytest.approx(4.0)


def test_cv_squared_matches_numpy_for_any_shape():
    x = np.random.default_rng(0).gamma(2.0, size=(3, 5))
    want = x.var() / x.mean() ** 2
    assert float(losses.cv_squared(x)) == pytest.approx(want, rel=1e-6)


def test_cv_squared_of_an_empty_batch_is_zero():
    assert float(losses.cv_squared(np.zeros(4))) == 0.0


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def reference_scores(num_tokens, num_experts):
    return batchwise.scores(draw(3, num_tokens, 2), draw(4, 2, num_experts))


def test_z_loss_is_the_mean_square_of_the_log_denominator():
    logits_TE, mask_T = draw(0, 6, 4), np.arange(6) != 2
    square_T = np.log(np.exp(logits_TE).sum(-1)) ** 2
    assert float(losses.z_loss(logits_TE)) == pytest.approx(square_T.mean())
    assert float(losses.z_loss(logits_TE, mask_T)) == pytest.approx(
        square_T[mask_T].mean()
    )
    assert float(losses.z_loss(logits_TE, np.zeros(6, bool))) == 0.0
    # 1,000 is past what `exp` holds in float32, or in float64.
    large = float(losses.z_loss(np.full((1, 1), 1000.0, "float32")))
    assert large == pytest.approx(1e6)


@pytest.mark.parametrize("num_experts", [1, 4])
def test_load_balance_loss_from_balance_to_collapse(num_experts):
    hot_TE = np.eye(num_experts)[np.arange(4 * num_experts) % num_experts]
    even_E = np.full(num_experts, 4.0)
    one_E = 4.0 * num_experts * np.eye(num_experts)[0]
    all_TE = np.eye(num_experts)[np.zeros(4 * num_experts, int)]
    assert float(losses.load_balance_loss(hot_TE, even_E)) == pytest.approx(0.0)
    assert float(losses.load_balance_loss(all_TE, even_E)) == pytest.approx(0.0)
    assert float(losses.load_balance_loss(hot_TE, one_E)) == pytest.approx(0.0)
    collapse = float(losses.load_balance_loss(all_TE, one_E))
    assert collapse == pytest.approx(num_experts - 1)
    nobody = losses.load_balance_loss(
        hot_TE, 0 * even_E, np.zeros(len(hot_TE), bool)
    )
    assert float(nobody) == 0.0


@pytest.mark.parametrize("masked", [False, True])
def test_threshold_loss_is_equation_20_and_never_negative(masked):
    score_TE = reference_scores(9, 4)
    threshold_E = np.array([0.0, 0.2, 0.5, 1.0])
    mask_T = np.arange(9) % 3 > 0 if masked else None
    chosen_TE = batchwise.batchwise_mask(score_TE, 3, mask_T)
    got = losses.batchwise_loss(
        tf.constant(score_TE), tf.constant(threshold_E), chosen_TE, mask_T
    )
    want = batchwise.batchwise_loss(score_TE, threshold_E, 3, mask_T)
    assert float(got) == pytest.approx(want, rel=1e-12) and want > 0
    # Zero where the two masks agree: thresholds between the third and the
    # fourth of each column.
    real_TE = score_TE if mask_T is None else score_TE[mask_T]
    between_E = np.sort(real_TE, axis=0)[-4:-2].mean(0)
    agree = losses.batchwise_loss(
        tf.constant(score_TE), tf.constant(between_E), chosen_TE, mask_T
    )
    assert float(agree) == 0.0
