"""Devices exchange gradients and statistics, and nothing of the tokens."""

import keras
import numpy as np

from moe_tf.distribute import MeshStrategy
from moe_tf.distribute import collectives
from tests.distribute import process


def dense_model(length):
    inputs = keras.Input((length,), dtype="int32")
    x = keras.layers.Embedding(31, 8)(inputs)
    x = keras.layers.Dense(16, activation="relu")(x)
    x = keras.layers.Dropout(0.2)(x)
    x = keras.layers.LayerNormalization()(x)
    return keras.Model(inputs, keras.layers.Dense(31)(x))


def steps():
    strategy, found = MeshStrategy({"batch": 4}), {}
    for optimizer in ("sgd", "adam"):
        for length in (5, 20):
            with strategy.scope():
                model = dense_model(length)
                model.compile(
                    optimizer,
                    keras.losses.SparseCategoricalCrossentropy(True),
                    metrics=["accuracy"],
                )
            tokens = np.zeros((8, length), "int32")
            found[optimizer, length] = collectives.of(
                model.train_on_batch, tokens, tokens
            )
    return found


def test_nothing_grows_with_tokens():
    found = process.run(steps)
    for optimizer in ("sgd", "adam"):
        short, long = found[optimizer, 5], found[optimizer, 20]
        assert {op.kind for op in short} == {"all-reduce"}
        assert sum(op.bytes for op in short) > 4 * 31 * 16  # The last kernel.
        assert [op[:3] for op in short] == [op[:3] for op in long]
