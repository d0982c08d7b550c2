import keras
import numpy as np
import pytest

from moe_tf import layers


@pytest.mark.thorough
def test_loss_with_drops_beside_the_loss_without():
    inner = layers.SparseMoE(4, 8, 1, capacity_factor=0.5, name="moe", seed=0)
    plain = layers.SparseMoE(4, 8, 1, name="plain", seed=0)
    model = keras.Sequential(
        [keras.Input((5,)), keras.Sequential([inner]), plain]
    )
    model.compile("sgd", "mse", jit_compile=False)
    x_TD = np.random.default_rng(0).normal(size=(40, 5)).astype("float32")

    def evaluate():
        return model.evaluate(x_TD, x_TD, verbose=0, return_dict=True)

    dropless = evaluate()
    assert dropless["moe_dropped_fraction"] == 0
    with layers.clipped_evaluation(model):
        clipped = evaluate()
        predicted_TD = model.predict(x_TD, verbose=0)
    # At the zero start all 32 tokens of a batch go to expert 0, which takes
    # ceil(0.5 * 32 / 4) of them; of the last 8, one.
    assert np.isclose(clipped["moe_dropped_fraction"], (28 / 32 + 7 / 8) / 2)
    assert clipped["plain_dropped_fraction"] == 0
    assert clipped["loss"] != dropless["loss"]
    assert evaluate() == dropless
    assert inner.eval_capacity_factor is None
    assert np.abs(model.predict(x_TD, verbose=0) - predicted_TD).max() > 0
