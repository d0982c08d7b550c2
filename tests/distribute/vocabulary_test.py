"""Training with tables sharded by word: what one device gives.

`tests/models/language_model_mesh_test.py` has the whole softmax, too.
"""

import functools
import warnings

import pytest

from moe_tf.benchmarks import mesh_text
from moe_tf.distribute import MeshStrategy
from tests import process

# With the axis that words are sharded over.
BATCH_4 = (("batch", 4),), "batch"
SQUARE = (("batch", 2), ("expert", 2)), "expert"
STEPS = 5


def strategy_of(mesh):
    axes, axis = mesh
    tables = "embedding/embeddings$", "softmax/kernel$"
    layouts = {name: (axis, None) for name in tables}
    return MeshStrategy(dict(axes), layout_map=layouts)


def train(mesh, optimizers, folder):
    """By optimizer, how training on real text differs from one device."""
    strategy, found = strategy_of(mesh), {}
    # Of a table that is not sharded, since its path is another.
    warnings.filterwarnings("error", "No variable of the model")
    prepared = mesh_text.prepare_text(folder)
    batches = mesh_text.read_batches(prepared, STEPS)
    for name in optimizers:
        setting = mesh_text.Setting(optimizer=name, steps=STEPS)
        run = functools.partial(
            mesh_text.train_model,
            setting=setting,
            batches=batches,
            vocabulary_size=prepared.vocabulary.size,
        )
        found[name] = mesh_text.differences(run(None), run(strategy))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh,optimizers",
    [
        (BATCH_4, ("adafactor",)),
        pytest.param(
            BATCH_4, ("adam_clipped", "factored_adam"), marks=pytest.mark.slow
        ),
        pytest.param(
            SQUARE,
            ("adafactor", "adam_clipped", "factored_adam"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_training_with_a_sampled_softmax_equals_one_device(
    mesh, optimizers, tmp_path, seed_corpus
):
    # 9.5e-7 and 1.5e-5 are the largest seen in 10 steps.
    found = process.run(train, mesh, optimizers, str(seed_corpus(tmp_path)))
    for name, apart in found.items():
        assert apart["loss"] < 1e-5, (name, apart)
        assert apart["weights_fraction"] < 2e-4, (name, apart)
        assert apart["slots_fraction"] < 2e-4, (name, apart)
