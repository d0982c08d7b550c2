import numpy as np
import pytest
import tensorflow as tf

from moe_tf.layers.attention import multi_head
from moe_tf.layers.recurrent.attention_lstm import AttentionLSTM
from tests import sets
from tests.reference import attention
from tests.reference.lstm import sigmoid

B, L, S, D, H, A = 2, 5, 4, 3, 7, 6
LENGTHS = np.array([4, 2])
BIAS_BS = multi_head.mask_bias(np.arange(S) < LENGTHS[:, None])


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def make(form="product", dtype="float64"):
    layer = AttentionLSTM(H, A, form, dtype=dtype)
    layer.build((None, None, D))
    for seed, weight in enumerate(layer.weights):
        weight.assign(0.5 * draw(*weight.shape, seed=seed))
    return layer


def numpy_loop(layer, x_BLD, values_BSD):
    """Outputs and weights, step after step."""
    kernel, recurrent, projection = (
        np.asarray(weight)
        for weight in (
            layer.kernel_IG,
            layer.recurrent_PG,
            layer.projection_HP,
        )
    )
    own = [np.asarray(weight) for weight in layer.attention.weights]
    outputs, weights = np.zeros((B, L, D)), np.zeros((B, L, S))
    for b in range(B):
        r, c = np.zeros(D), np.zeros(H)
        for t in range(L):
            sources = values_BSD[b, : LENGTHS[b]]
            context, weight = attention.additive(
                r, sources, *own, layer.attention.form
            )
            z = np.concatenate([x_BLD[b, t], context]) @ kernel + r @ recurrent
            i, f, g, o = np.split(z, 4)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            r = (sigmoid(o) * np.tanh(c)) @ projection
            outputs[b, t], weights[b, t, : LENGTHS[b]] = r, weight
    return outputs, weights


@pytest.mark.parametrize("form", ["product", "sum"])
def test_matches_a_numpy_loop_whole_and_in_steps(form):
    layer = make(form)
    x_BLD, values_BSD = draw(B, L, D, seed=8), draw(B, S, D, seed=9)
    memory = values_BSD, layer.attention.keys(values_BSD), BIAS_BS
    want, want_weights = numpy_loop(layer, x_BLD, values_BSD)
    np.testing.assert_allclose(layer(x_BLD, *memory), want, atol=1e-9)
    states = layer.initial_states(B)
    for t in range(L):
        y_BD, weight_BS, states = layer.step(x_BLD[:, t], states, *memory)
        np.testing.assert_allclose(y_BD, want[:, t], atol=1e-9)
        np.testing.assert_allclose(weight_BS, want_weights[:, t], atol=1e-9)


@sets.JIT_COMPILE_SLOW
def test_gradients_match_finite_differences(jit_compile):
    layer = make()
    x_BLD = tf.Variable(draw(B, L, D, seed=8))
    values_BSD = tf.Variable(draw(B, S, D, seed=9))
    upstream = draw(B, L, D, seed=10)
    variables = [x_BLD, values_BSD, *(w.value for w in layer.weights)]

    @tf.function(jit_compile=jit_compile)
    def evaluate():
        with tf.GradientTape() as tape:
            keys = layer.attention.keys(values_BSD)
            y_BLD = layer(x_BLD, values_BSD, keys, BIAS_BS)
            loss = tf.reduce_sum(y_BLD * upstream)
        return loss, tape.gradient(loss, variables)

    step = 1e-6
    gradients = evaluate()[1]
    for variable, gradient in zip(variables, gradients, strict=True):
        along = draw(*variable.shape, seed=11)
        here, ends = variable.numpy(), []
        for sign in (1, -1):
            variable.assign(here + sign * step * along)
            ends.append(float(evaluate()[0]))
        variable.assign(here)
        want = (ends[0] - ends[1]) / (2 * step)
        got = float(tf.reduce_sum(gradient * along))
        assert got == pytest.approx(want, rel=1e-4, abs=1e-7)
        assert abs(want) > 1e-5


def test_config_holds_every_argument():
    layer = AttentionLSTM(H, A, "sum", name="lstm")
    copy = AttentionLSTM.from_config(layer.get_config())
    assert copy.get_config() == layer.get_config()
    assert (copy.units, copy.attention.units) == (H, A)
    assert copy.attention.form == "sum"
    with pytest.raises(ValueError, match="units=0"):
        AttentionLSTM(0, A)
