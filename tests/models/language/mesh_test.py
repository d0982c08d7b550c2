"""Language models on a mesh, their tables sharded by vocabulary."""

import contextlib
import functools

import keras
import numpy as np
import pytest

from moe_tf import models
from moe_tf import optimizers
from moe_tf.distribute import MeshStrategy
from tests import process

VOCABULARY, STEPS = 50, 4
LAYOUTS = {
    "embedding/embeddings": ("model", None),
    "softmax/kernel": ("model", None),
}
CASES = {
    "sampled, projected": ("LSTM-2048-512", 10, "adam", "float32"),
    "whole softmax, experts": ("MoE-4", None, "adam", "float32"),
    "factored_adam": ("MoE-4", 10, "factored_adam", "float32"),
    "float64": ("MoE-1-Wide", 10, "adam", "float64"),
    "bfloat16": ("4xLSTM-512", 10, "adam", "mixed_bfloat16"),
}


def train(case, scope):
    """Losses, that of evaluation last, and variables."""
    variant, num_sampled, optimizer, policy = case
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(policy)
    kind = {
        "adam": keras.optimizers.Adam,
        "factored_adam": optimizers.FactoredAdam,
    }[optimizer]
    with scope:
        scorer = models.NextWordScorer(
            models.LanguageModel(
                variant, VOCABULARY, width=8, num_sampled=num_sampled, seed=1
            )
        )
        scorer.build()
        scorer.compile_for_words(kind(0.01), jit_compile=False)
        scorer.optimizer.build(scorer.trainable_variables)
    tokens = np.random.default_rng(0).integers(4, VOCABULARY, (8, 6), "int32")
    tokens[:, 4:] *= np.arange(8)[:, None] % 2  # padding
    inputs = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    batch = (inputs, tokens[:, 1:], (tokens[:, 1:] > 0).astype("float32"))
    losses = [scorer.train_on_batch(*batch)[0] for _ in range(STEPS)]
    losses.append(scorer.test_on_batch(*batch)[0])
    return np.array(losses, "float64"), {
        variable.path: (variable.numpy(), getattr(variable.value, "spec", None))
        for variable in scorer.trainable_variables
    }


QUICK = ("whole softmax, experts", "factored_adam")


def train_both_ways(names):
    strategy = MeshStrategy({"batch": 2, "model": 2}, layout_map=LAYOUTS)
    return {
        name: (
            train(case, contextlib.nullcontext()),
            train(case, strategy.scope()),
        )
        for name, case in CASES.items()
        if name in names
    }


@functools.cache
def runs(names):
    return process.run(train_both_ways, names)


@pytest.mark.thorough
@pytest.mark.parametrize("name", QUICK)
def test_equals_one_device(name):
    check(name, *runs(QUICK)[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in QUICK])
def test_other_models_equal_one_device(name):
    check(name, *runs((name,))[name])


def check(name, one, mesh):
    (losses, variables), (mesh_losses, on_mesh) = one, mesh
    policy = CASES[name][-1]
    # The loss is float32 under any policy.
    tolerances = {"float32": 2e-6, "float64": 5e-7, "mixed_bfloat16": 2e-2}
    tolerance = tolerances[policy]
    np.testing.assert_allclose(mesh_losses, losses, rtol=tolerance)
    assert losses[0] > losses[STEPS - 1]
    specs = {}
    for path, (value, _) in variables.items():
        got, specs[path] = on_mesh[path]
        np.testing.assert_allclose(got, value, atol=tolerance, err_msg=path)
    tables = [path for path, spec in specs.items() if "model" in spec]
    assert len(tables) == 2
