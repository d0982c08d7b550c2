"""Translation models on a mesh: they train as on one device."""

import contextlib

import keras
import numpy as np
import pytest

from moe_tf import models
from moe_tf.distribute import MeshStrategy
from moe_tf.models.translation import factory
from tests import process

VOCABULARY, STEPS = 20, 2
# Through the trainer: `tests/training/translation_mesh_test.py`.
CASES = {
    "GNMT-MoE-4": {
        "bidirectional": True,
        "cells": 12,
        "encoder_layers": 2,
        "moe": {"k": 2},
    },
}


def train(name, scope):
    """Losses and variables."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    with scope:
        scorer = models.TranslationScorer(
            factory.make_translation_model(
                name, VOCABULARY, width=8, seed=1, **CASES[name]
            ),
            label_smoothing=0.1,
        )
        scorer.build()
        scorer.compile_for_words(keras.optimizers.Adam(0.01), jit_compile=False)
    rng = np.random.default_rng(0)
    source = rng.integers(4, VOCABULARY, (4, 5), "int32")
    source[::2, 3:] = 0  # padding
    tokens = np.concatenate([np.full((4, 1), 2, "int32"), source[:, :-1]], 1)
    inputs = {"source": source, "tokens": tokens, "targets": source}
    batch = (inputs, source, (source > 0).astype("float32"))
    losses = [scorer.train_on_batch(*batch)[0] for _ in range(STEPS)]
    return np.array(losses, "float64"), {
        variable.path: variable.numpy() for variable in scorer.trainable_weights
    }


def train_both_ways():
    strategy = MeshStrategy({"batch": 2})
    return {
        name: (
            train(name, contextlib.nullcontext()),
            train(name, strategy.scope()),
        )
        for name in CASES
    }


@pytest.fixture(scope="module")
def runs():
    return process.run(train_both_ways, timeout=600)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_equals_one_device(runs, name):
    (losses, variables), (mesh_losses, mesh_variables) = runs[name]
    np.testing.assert_allclose(mesh_losses, losses, rtol=2e-6)
    assert losses[0] > losses[STEPS - 1]
    for path, value in variables.items():
        # Adam makes steps of 0.01, of gradients near its epsilon too.
        np.testing.assert_allclose(
            mesh_variables[path], value, atol=1e-5, err_msg=path
        )
