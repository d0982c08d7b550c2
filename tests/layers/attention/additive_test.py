import keras
import numpy as np
import pytest
import tensorflow as tf

from moe_tf.layers.attention import multi_head
from moe_tf.layers.attention.additive import FORMS
from moe_tf.layers.attention.additive import AdditiveAttention
from tests.reference import attention

B, L, S, D, A = 2, 3, 4, 5, 6
LENGTHS = np.array([4, 2])


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def make(form, dtype="float64"):
    layer = AdditiveAttention(A, form, dtype=dtype)
    layer.build((None, None, D))
    for seed, weight in enumerate(layer.weights):
        weight.assign(draw(*weight.shape, seed=seed))
    return layer


def attend(layer, query_BLD, values_BSD, lengths=LENGTHS):
    mask_BS = np.arange(values_BSD.shape[1]) < lengths[:, None]
    bias_BS = multi_head.mask_bias(mask_BS)
    values_BSD = tf.cast(values_BSD, layer.compute_dtype)
    return layer(query_BLD, values_BSD, layer.keys(values_BSD), bias_BS)


@pytest.mark.parametrize("form", FORMS)
def test_matches_the_equations_one_unit_at_a_time(form):
    layer = make(form)
    query_BLD, values_BSD = draw(B, L, D, seed=8), draw(B, S, D, seed=9)
    context_BLD, weight_BLS = attend(layer, query_BLD, values_BSD)
    weights = [np.asarray(weight) for weight in layer.weights]
    for b, t in np.ndindex(B, L):
        context_D, weight_S = attention.additive(
            query_BLD[b, t], values_BSD[b, : LENGTHS[b]], *weights, form
        )
        np.testing.assert_allclose(context_BLD[b, t], context_D, atol=1e-9)
        got_S = np.asarray(weight_BLS[b, t])
        np.testing.assert_allclose(got_S[: LENGTHS[b]], weight_S, atol=1e-9)
        assert not got_S[LENGTHS[b] :].any()


@pytest.mark.parametrize("form", FORMS)
def test_gradients_match_finite_differences(form):
    layer = make(form)
    query_BLD = tf.Variable(draw(B, L, D, seed=8))
    values_BSD = tf.Variable(draw(B, S, D, seed=9))
    upstream = draw(B, L, D, seed=10)
    variables = [query_BLD, values_BSD, *(w.value for w in layer.weights)]

    @tf.function
    def evaluate():
        with tf.GradientTape() as tape:
            context_BLD, _ = attend(layer, query_BLD, values_BSD)
            loss = tf.reduce_sum(context_BLD * upstream)
        return loss, tape.gradient(loss, variables)

    step = 1e-6
    for index, variable in enumerate(variables):
        along = draw(*variable.shape, seed=11)
        gradient = evaluate()[1][index]
        here, ends = variable.numpy(), []
        for sign in (1, -1):
            variable.assign(here + sign * step * along)
            ends.append(float(evaluate()[0]))
        variable.assign(here)
        want = (ends[0] - ends[1]) / (2 * step)
        got = float(tf.reduce_sum(gradient * along))
        assert got == pytest.approx(want, rel=1e-5, abs=1e-7)
        assert abs(want) > 1e-4


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_float32_under_a_mixed_policy(form):
    layer = make(form, dtype="mixed_bfloat16")
    context, weights = attend(layer, draw(B, L, D), draw(B, S, D))
    assert context.dtype == tf.bfloat16 and weights.dtype == tf.float32


def test_config_and_settings():
    layer = AdditiveAttention(A, "sum", name="a")
    copy = AdditiveAttention.from_config(layer.get_config())
    assert copy.get_config() == layer.get_config()
    assert copy.units == A and copy.form == "sum"
    with pytest.raises(ValueError, match="form=dot"):
        AdditiveAttention(A, "dot")
    with pytest.raises(ValueError, match="units=0"):
        AdditiveAttention(0)
    assert keras.saving.get_registered_name(AdditiveAttention).startswith(
        "moe_tf"
    )
