"""Devices exchange gradients and statistics, and nothing of the tokens."""

import keras
import numpy as np
import pytest

from moe_tf import layers
from moe_tf.distribute import MeshStrategy
from moe_tf.distribute import collectives
from tests import process
from tests import sets
from tests.distribute import models


def dense_model(length):
    inputs = keras.Input((length,), dtype="int32")
    x = keras.layers.Embedding(31, 8)(inputs)
    x = keras.layers.Dense(16, activation="relu")(x)
    x = keras.layers.Dropout(0.2)(x)
    x = keras.layers.LayerNormalization()(x)
    return keras.Model(inputs, keras.layers.Dense(31)(x))


def steps(optimizer):
    """What a step sends, by number of tokens a row."""
    strategy, found = MeshStrategy({"batch": 4}), {}
    for length in (5, 20):
        with strategy.scope():
            model = dense_model(length)
            model.compile(
                optimizer,
                keras.losses.SparseCategoricalCrossentropy(True),
                metrics=["accuracy"],
            )
            models.build_slots(model)
        tokens = np.zeros((8, length), "int32")
        found[length] = collectives.list_collectives(
            model.train_on_batch, tokens, tokens
        )
    return found


@pytest.mark.parametrize("optimizer", [sets.thorough("adam"), sets.slow("sgd")])
def test_nothing_grows_with_tokens(optimizer):
    found = process.run(steps, optimizer)
    short, long = found[5], found[20]
    assert {op.kind for op in short} == {"all-reduce"}
    assert sum(op.bytes for op in short) > 4 * 31 * 16  # The last kernel.
    assert [op[:3] for op in short] == [op[:3] for op in long]


def kinds_in_16_bits():
    """The dtypes of what devices send while a bfloat16 model trains."""
    strategy, found = MeshStrategy({"batch": 4}), {}
    keras.config.set_dtype_policy("mixed_bfloat16")
    with strategy.scope():
        model = keras.Sequential([keras.Input((5, 8))])
        model.add(keras.layers.Dense(8))
        model.add(layers.SparseMoE(4, 12, 2, num_groups=4))
        model.compile("sgd", "mse", jit_compile=False)
    x_BLD = np.random.default_rng(0).normal(size=(8, 5, 8)).astype("float32")
    for op in collectives.list_collectives(model.train_on_batch, x_BLD, x_BLD):
        found.setdefault(op.kind, set()).add(op.dtype)
    return found


def test_nothing_is_sent_as_bfloat16():
    """NCCL refuses it, and sums of it would round at each addition."""
    found = process.run(kinds_in_16_bits)
    assert found["all-to-all"] == {"float16"}  # Its bits.
    assert found["all-reduce"] <= {"float32", "int64"}
