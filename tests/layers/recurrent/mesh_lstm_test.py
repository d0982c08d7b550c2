import keras
import numpy as np
import pytest
import tensorflow as tf

from moe_tf.layers.recurrent import mesh_lstm
from moe_tf.layers.recurrent import projected_lstm
from tests import sets

CELLS = {
    "plain": lambda: keras.layers.LSTMCell(6, use_bias=False, dtype="float64"),
    "projected": lambda: projected_lstm.ProjectedLSTMCell(
        6, 4, dtype="float64"
    ),
}


@pytest.mark.parametrize(
    "length", [9, *map(sets.thorough, (1, 8, 10)), *map(sets.slow, (3, 5))]
)
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("wrap", [sets.thorough(lambda f: f), tf.function])
def test_equals_the_loop_of_keras(name, length, wrap):
    random = np.random.default_rng(0)
    x_BLI = tf.constant(random.normal(size=(3, length, 5)))
    layer = keras.layers.RNN(
        CELLS[name](), return_sequences=True, dtype="float64"
    )
    layer.build(x_BLI.shape)
    kernels = [variable.value for variable in layer.trainable_variables]
    upstream_BLP = random.normal(size=layer(x_BLI).shape)

    def outputs_and_gradients(function):
        with tf.GradientTape() as tape:
            tape.watch(x_BLI)
            y_BLP = function(x_BLI)
        return [
            y_BLP,
            *tape.gradient(y_BLP, [x_BLI, *kernels], upstream_BLP),
        ]

    got = outputs_and_gradients(
        wrap(lambda x_BLI: mesh_lstm.lstm(x_BLI, *kernels))
    )
    want = outputs_and_gradients(layer)
    assert len(got) == (5 if name == "projected" else 4)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)
