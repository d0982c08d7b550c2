"""A model of LSTM and experts leaves the mesh it was trained on."""

import contextlib
import tempfile

import keras
import numpy as np
import pytest
import tensorflow as tf

import moe_tf
from tests import process
from tests import sets
from tests.distribute import models

RNG = np.random.default_rng(0)
X = RNG.integers(1, 31, (16, 3), "int32")
Y = (X + 1) % 31


def make(layer, scope=None):
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    with scope or contextlib.nullcontext():
        inputs = keras.Input((3,), dtype="int32")
        x = keras.layers.Embedding(32, 8, mask_zero=True)(inputs)
        # A loop, which ended the process before it was unrolled.
        x = layer(8, return_sequences=True)(x)
        x = moe_tf.SparseMoE(
            4, 12, 2, capacity_factor=1.0, num_groups=4, seed=1, name="moe"
        )(x)
        model = keras.Model(inputs, keras.layers.Dense(32)(x))
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("adam", loss, jit_compile=False)
        return models.build_slots(model)


def leave(layer):
    """Losses on the mesh and on one device; what files of the mesh predict."""
    found = {}
    strategy = moe_tf.MeshStrategy({"batch": 4})
    for name, scope in (("one", None), ("mesh", strategy.scope())):
        model = make(layer, scope)
        history = model.fit(X, Y, batch_size=8, epochs=2, verbose=0).history
        found[name] = history["loss"]
    predicted = model.predict(X[:4], verbose=0)
    with tempfile.TemporaryDirectory() as folder:
        model.save(f"{folder}/model.keras")
        model.export(f"{folder}/served", verbose=False)
        loaded = keras.models.load_model(f"{folder}/model.keras")
        served = tf.saved_model.load(f"{folder}/served")
        return found, {
            "mesh": predicted,
            "keras": loaded.predict(X[:4], verbose=0),
            "served": served.serve(X[:4]).numpy(),
            "served one": served.serve(X[:1]).numpy(),
        }


@pytest.mark.parametrize(
    "layer", [sets.thorough(keras.layers.LSTM), sets.slow(keras.layers.GRU)]
)
def test_files_of_a_mesh_predict_the_same(layer):
    losses, predicted = process.run(leave, layer)
    np.testing.assert_allclose(losses["mesh"], losses["one"], rtol=1e-6)
    want = predicted.pop("mesh")
    for name, got in predicted.items():
        np.testing.assert_allclose(
            got, want[: len(got)], atol=1e-6, err_msg=name
        )
