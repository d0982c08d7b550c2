"""SparseMoE in Keras models: training, files, masks, accumulation."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from moe_tf.layers import moe
from tests import sets


def tokens(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.slow
def test_same_seed_same_training():
    x_BLD, y_BLD = tokens(6, 3, 6), tokens(6, 3, 6, seed=1)
    histories = []
    for _ in range(2):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([moe.SparseMoE(4, 5, k=2, seed=1)])
        model.compile("adam", "mse")
        history = model.fit(x_BLD, y_BLD, epochs=3, verbose=0).history
        histories.append(history["loss"])
    assert histories[0] == histories[1]


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.moe = moe.SparseMoE(4, 5, k=2, name="moe", seed=0)

    def call(self, inputs, training=False):
        return inputs + self.moe(inputs, training=training)


def sequential():
    return keras.Sequential([moe.SparseMoE(4, 5, k=2, name="moe", seed=0)])


def functional():
    inputs = keras.Input((None, 6))
    hidden = moe.SparseMoE(4, 5, k=2, name="moe", seed=0)(inputs)
    return keras.Model(inputs, keras.layers.add([inputs, hidden]))


@pytest.mark.parametrize(
    "make,jit_compile",
    [
        sets.slow(sequential, False),
        sets.thorough(functional, True),
        sets.thorough(Subclassed, False),
        pytest.param(sequential, True, marks=pytest.mark.slow),
        pytest.param(functional, False, marks=pytest.mark.slow),
        pytest.param(Subclassed, True, marks=pytest.mark.slow),
    ],
)
def test_fits_in_any_keras_model_and_logs_its_balance(make, jit_compile):
    model = make()
    optimizer = keras.optimizers.Adam(0.02)
    model.compile(optimizer, "mse", jit_compile=jit_compile)
    x_BLD = tokens(8, 3, 6)
    history = model.fit(
        x_BLD, x_BLD, validation_data=(x_BLD, x_BLD), epochs=9, verbose=0
    ).history
    assert history["val_loss"][-1] < 0.9 * history["val_loss"][0]
    for statistic in ("cv_importance", "cv_load", "max_over_mean_load"):
        assert len(history[f"moe_{statistic}"]) == 9
        assert len(history[f"val_moe_{statistic}"]) == 9
    assert set(history["moe_dropped_fraction"]) == {0.0}


@pytest.mark.parametrize("make", [sets.thorough(sequential), functional])
def test_keras_file_and_saved_model_give_the_same_outputs(make, tmp_path):
    model = make()
    x_BLD = tokens(4, 3, 6).astype("float32")
    model.compile("adam", "mse")
    model.fit(x_BLD, x_BLD, verbose=0)
    want_BLD = model.predict(x_BLD, verbose=0)

    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(x_BLD, verbose=0), want_BLD)
    assert loaded.get_layer("moe").get_config() == (
        model.get_layer("moe").get_config()
    )

    model.export(tmp_path / "exported", verbose=False)
    served = tf.saved_model.load(tmp_path / "exported")
    for rows in (4, 1):  # any batch size
        got_BLD = served.serve(x_BLD[:rows])
        np.testing.assert_allclose(got_BLD, want_BLD[:rows], atol=1e-6)


def test_mask_of_an_embedding_arrives():
    ids_BL = np.array([[3, 4, 0, 0], [5, 0, 0, 0]])
    model = keras.Sequential(
        [
            keras.layers.Embedding(9, 6, mask_zero=True),
            moe.SparseMoE(4, 5, k=2, name="moe"),
        ]
    )
    out_BLD = model(ids_BL)
    np.testing.assert_array_equal(np.asarray(out_BLD)[ids_BL == 0], 0.0)
    assert np.sum(model.get_layer("moe").balance.assigned_E) == 3 * 2


def test_gradient_accumulation_keeps_the_balancing_gradient():
    # Two steps of accumulation over the same batch equal one step on it.
    weights = []
    for accumulate, epochs in ((None, 1), (2, 2)):
        keras.utils.set_random_seed(0)
        layer = moe.SparseMoE(
            4, 5, k=4, seed=1, importance_weight=3.0, name="moe"
        )
        model = keras.Sequential([layer])
        x_TD = tokens(8, 6)
        model.build(x_TD.shape)
        layer.router.gate_DE.assign(tokens(6, 4, seed=4))
        layer.router.noise_DE.assign(np.full((6, 4), -50.0))  # no noise
        noise = layer.router.noise_DE
        noise.trainable = False
        optimizer = keras.optimizers.SGD(
            0.5, gradient_accumulation_steps=accumulate
        )
        model.compile(optimizer, "mse", jit_compile=False)
        model.fit(np.abs(x_TD), x_TD, batch_size=8, epochs=epochs, verbose=0)
        weights.append(np.asarray(layer.router.gate_DE))
    start_DE = tokens(6, 4, seed=4)
    assert np.abs(weights[0] - start_DE).max() > 1e-2
    np.testing.assert_allclose(weights[1], weights[0], rtol=1e-4, atol=1e-6)
