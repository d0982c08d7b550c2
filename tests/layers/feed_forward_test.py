import numpy as np
import pytest
import tensorflow as tf

from moe_tf.layers.feed_forward import FeedForward
from tests import keras_contract


class FeedForwardTest(keras_contract.TestCase):
    def test_contract(self):
        self.run_layer_test(
            FeedForward,
            init_kwargs={"hidden_units": (6, 7), "activation": "tanh"},
            input_shape=(2, 3, 4),
            expected_output_shape=(2, 3, 4),
            expected_num_trainable_weights=3,
            supports_masking=True,
        )


@pytest.mark.parametrize("hidden_units", [(16,), (6, 5, 7)])
def test_matches_numpy(hidden_units):
    inputs = np.random.default_rng(0).normal(size=(2, 3, 4)).astype("float32")
    layer = FeedForward(hidden_units)
    got = layer(inputs)
    *hidden, last = (np.asarray(w) for w in layer.weights)
    want = inputs
    for kernel in hidden:
        want = np.maximum(want @ kernel, 0)
    np.testing.assert_allclose(got, want @ last, rtol=1e-5, atol=1e-6)
    assert (np.asarray(got) < 0).any()  # the last layer is linear


def test_xla_gives_the_same():
    layer = FeedForward((6, 5))
    inputs = np.random.default_rng(0).normal(size=(2, 3, 4)).astype("float32")
    want = layer(inputs)
    compiled = tf.function(layer, jit_compile=True)
    np.testing.assert_allclose(compiled(inputs), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("hidden_units", [(), (4, 0)])
def test_refuses_empty_layers(hidden_units):
    with pytest.raises(ValueError, match="`hidden_units` must hold"):
        FeedForward(hidden_units)
