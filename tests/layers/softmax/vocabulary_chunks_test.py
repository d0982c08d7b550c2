import numpy as np
import pytest
import tensorflow as tf

from moe_tf.layers.softmax import token_chunks
from moe_tf.layers.softmax import vocabulary_chunks
from tests import sets

T, V, D = 6, 11, 5


def outputs_and_gradients(full_nll, dtype, **kwargs):
    random = np.random.default_rng(0)
    features_TD = tf.constant(random.normal(size=(T, D)), dtype)
    kernel_VD = tf.Variable(3 * random.normal(size=(V, D)), dtype=tf.float64)
    if dtype != "float64":
        kernel_VD = tf.Variable(tf.cast(kernel_VD, "float32"))
    targets_T = tf.constant(random.integers(0, V, T), "int32")
    with tf.GradientTape() as tape:
        tape.watch(features_TD)
        nll_T = full_nll(features_TD, kernel_VD, targets_T, **kwargs)
    upstream_T = tf.range(T, dtype=nll_T.dtype)
    sources = [features_TD, kernel_VD]
    return [nll_T, *tape.gradient(nll_T, sources, upstream_T)]


@pytest.mark.parametrize("words", [*map(sets.thorough, (1, 5, 10)), 4, 11, 99])
@pytest.mark.parametrize(
    "dtype,tolerance", [("float64", 1e-12), ("bfloat16", 2e-2)]
)
def test_equals_chunks_of_tokens(words, dtype, tolerance):
    got = outputs_and_gradients(
        vocabulary_chunks.full_nll, dtype, chunk_bytes=4 * T * words
    )
    want = outputs_and_gradients(
        token_chunks.full_nll, dtype, chunk_bytes=2**26
    )
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype
        one, other = (tf.cast(x, "float64") for x in (one, other))
        scale = np.abs(other).max()
        np.testing.assert_allclose(one, other, atol=tolerance * scale)


@pytest.mark.parametrize(
    "tokens,vocabulary,chunk_bytes,sizes",
    [
        (6, 11, 4 * 6 * 11, [11]),
        (6, 11, 4 * 6 * 4, [4, 4, 3]),
        (6, 11, 1, [1] * 11),
        (10**6, 6400, 1, [200] * 32),  # no more than 32
    ],
)
def test_chunks_cover_the_vocabulary(tokens, vocabulary, chunk_bytes, sizes):
    got = vocabulary_chunks._chunks(tokens, vocabulary, chunk_bytes)
    assert got == sizes
