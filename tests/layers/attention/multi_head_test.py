import numpy as np
import pytest
import tensorflow as tf

from moe_tf.layers.attention import multi_head
from moe_tf.layers.attention.multi_head import CrossAttention
from moe_tf.layers.attention.multi_head import SelfAttention
from tests.reference import attention

LENGTHS = np.array([5, 2, 4])


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def arrays(layer):
    return [np.asarray(weight, "float64") for weight in layer.weights]


@pytest.mark.parametrize("num_heads", [1, 2, 6])
def test_self_attention_matches_numpy(num_heads):
    x_BLD = draw(3, 5, 6)
    layer = SelfAttention(num_heads)
    layer.build((None, None, 6))
    got = layer(x_BLD, multi_head.causal_bias(5))
    qkv, output = arrays(layer)
    projected = np.split(x_BLD @ qkv, 3, axis=-1)
    want, _ = attention.dot_product(
        *projected, num_heads, lambda b, t, s: s <= t
    )
    np.testing.assert_allclose(got, want @ output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_heads", [1, 3])
def test_cross_attention_matches_numpy(num_heads):
    x_BLD, memory_BSD = draw(3, 4, 6), draw(3, 5, 6, seed=1)
    layer = CrossAttention(num_heads)
    layer.build((None, None, 6))
    mask_BS = np.arange(5) < LENGTHS[:, None]
    got, weights = layer(
        x_BLD,
        *layer.keys_and_values(memory_BSD),
        multi_head.mask_bias(mask_BS)[:, None, None],
    )
    query, key_value, output = arrays(layer)
    want, want_weights = attention.dot_product(
        x_BLD @ query,
        *np.split(memory_BSD @ key_value, 2, axis=-1),
        num_heads,
        lambda b, t, s: s < LENGTHS[b],
    )
    np.testing.assert_allclose(got, want @ output, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(weights, want_weights, rtol=1e-4, atol=1e-6)
    assert not np.asarray(weights)[1, ..., 2:].any()  # exactly 0


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_steps_equal_the_whole_sequence(dtype):
    x_BLD = draw(3, 5, 6)
    layer = SelfAttention(2, dtype=dtype)
    layer.build((None, None, 6))
    want = layer(x_BLD, multi_head.causal_bias(5))
    keys = values = tf.zeros((3, 2, 7, 3), want.dtype)
    for position in range(5):
        got, keys, values = layer.step(
            tf.cast(x_BLD[:, position], want.dtype),
            tf.fill((3,), position),
            keys,
            values,
        )
        assert got.dtype == want.dtype
        tolerance = 1e-5 if dtype == "float32" else 2e-2
        np.testing.assert_allclose(
            tf.cast(got, "float32"),
            tf.cast(want[:, position], "float32"),
            atol=tolerance,
        )


def test_padding_alone_gives_numbers():
    bias = multi_head.mask_bias(np.zeros((1, 4), bool))
    weights = multi_head.attention_weights(draw(1, 4), bias)
    assert np.isfinite(weights).all()


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="num_heads=4, width=6"):
        SelfAttention(4).build((None, None, 6))
    with pytest.raises(ValueError, match="`num_heads` must"):
        CrossAttention(0)
