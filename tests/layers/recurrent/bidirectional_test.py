import keras
import numpy as np
import pytest
import tensorflow as tf

from moe_tf.layers.recurrent import bidirectional
from moe_tf.layers.recurrent.bidirectional import BidirectionalLSTM
from tests.reference.lstm import lstm

LENGTHS = [5, 1, 3, 0]
MASK_BL = np.arange(5) < np.array(LENGTHS)[:, None]


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def test_reverse_turns_each_row_by_its_own_length():
    x_BLD = draw(4, 5, 2)
    got = np.asarray(bidirectional.reverse_sequences(x_BLD, MASK_BL))
    for row, length in enumerate(LENGTHS):
        np.testing.assert_array_equal(
            got[row, :length], x_BLD[row, :length][::-1]
        )
        np.testing.assert_array_equal(got[row, length:], x_BLD[row, length:])


def test_the_gradient_of_reverse_is_that_of_a_gather():
    x_BLD, upstream = tf.constant(draw(4, 5, 2)), draw(4, 5, 2, seed=1)
    with tf.GradientTape() as tape:
        tape.watch(x_BLD)
        loss = tf.reduce_sum(
            bidirectional.reverse_sequences(x_BLD, MASK_BL) * upstream
        )
    np.testing.assert_array_equal(
        tape.gradient(loss, x_BLD),
        bidirectional.reverse_sequences(upstream, MASK_BL),
    )


def test_both_ways_match_each_row_by_itself():
    layer, x_BLD = BidirectionalLSTM(7), draw(4, 5, 6)
    layer.build((None, None, 6))
    got = np.asarray(layer(x_BLD, mask=MASK_BL))
    ahead, back = (
        [np.asarray(w) for w in rnn.weights]
        for rnn in (layer.forward, layer.backward)
    )
    for row, length in enumerate(LENGTHS):
        if not length:
            continue
        words = x_BLD[row : row + 1, :length]
        want = [lstm(words, *ahead)[0], lstm(words[:, ::-1], *back)[0][:, ::-1]]
        np.testing.assert_allclose(
            got[row : row + 1, :length],
            np.concatenate(want, axis=-1),
            rtol=1e-4,
            atol=1e-5,
        )


def test_config_and_settings():
    layer = BidirectionalLSTM(7, name="both")
    copy = BidirectionalLSTM.from_config(layer.get_config())
    assert copy.get_config() == layer.get_config() and copy.units == 7
    with pytest.raises(ValueError, match="units=0"):
        BidirectionalLSTM(0)
    with pytest.raises(ValueError, match="must be even"):
        BidirectionalLSTM(7).build((None, None, 5))
    assert "moe_tf" in keras.saving.get_registered_name(BidirectionalLSTM)
