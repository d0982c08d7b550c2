"""Keras's optimizers on a mesh, with the sparse gradients of an embedding."""

import contextlib

import keras
import numpy as np
import pytest

from moe_tf.distribute import MeshStrategy
from moe_tf.layers.softmax import embedding_rows
from tests import process

QUICK = ("Adadelta", "Adamax", "Nadam")
SLOW = (
    *("Adafactor", "Adagrad", "Adam", "AdamW", "Ftrl", "Lamb", "Lion"),
    *("RMSprop", "SGD"),
)


class Rows(keras.layers.Layer):
    def build(self, shape):
        self.table = keras.layers.Embedding(20, 8)
        self.table.build(shape)
        self.built = True

    def call(self, inputs):
        return embedding_rows.shard_rows(
            self.table(embedding_rows.replicate_ids(inputs))
        )


def losses(names, on_mesh):
    strategy = MeshStrategy({"batch": 2}) if on_mesh else None
    tokens = np.arange(32, dtype="int32").reshape(8, 4) % 20
    wanted, found = np.ones((8, 4, 3), "float32"), {}
    for name in names:
        keras.utils.set_random_seed(0)
        with strategy.scope() if strategy else contextlib.nullcontext():
            inputs = keras.Input((4,), dtype="int32", batch_size=8)
            model = keras.Sequential([inputs, Rows(), keras.layers.Dense(3)])
            optimizer = getattr(keras.optimizers, name)(0.1)
            model.compile(optimizer, "mse", jit_compile=False)
        found[name] = [model.train_on_batch(tokens, wanted) for _ in range(4)]
    return found


@pytest.mark.thorough
@pytest.mark.parametrize(
    "names", [QUICK, pytest.param(SLOW, marks=pytest.mark.slow)]
)
def test_sparse_gradients_do_what_they_do_on_one_device(names):
    got, want = (process.run(losses, names, mesh) for mesh in (True, False))
    for name in names:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5)
        assert got[name][-1] != got[name][0]
