"""Tables of words sharded by word: what one device gives."""

import contextlib
import functools
import tempfile

import keras
import numpy as np
import pytest

from moe_tf.benchmarks import mesh_text
from moe_tf.distribute import MeshStrategy
from moe_tf.models.language_model import LanguageModel
from moe_tf.models.next_word_scorer import NextWordScorer
from tests.distribute import process

# With the axis that words are sharded over.
BATCH_4 = (("batch", 4),), "batch"
SQUARE = (("batch", 2), ("expert", 2)), "expert"
STEPS = 5
VOCABULARY, WIDTH = 1000, 16


def strategy_of(mesh):
    axes, axis = mesh
    tables = "embedding/embeddings$", "softmax/kernel$"
    layouts = {name: (axis, None) for name in tables}
    return MeshStrategy(dict(axes), layout_map=layouts)


def train(mesh, optimizers):
    """By optimizer, how training on real text differs from one device."""
    strategy, found = strategy_of(mesh), {}
    with tempfile.TemporaryDirectory() as folder:
        prepared = mesh_text.prepare(folder)
        batches = mesh_text.read(prepared, STEPS)
    for name in optimizers:
        setting = mesh_text.Setting(optimizer=name, steps=STEPS)
        run = functools.partial(
            mesh_text.train,
            setting=setting,
            batches=batches,
            vocabulary_size=prepared.vocabulary.size,
        )
        found[name] = mesh_text.differences(run(None), run(strategy))
    return found


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
def test_training_with_a_sampled_softmax_equals_one_device(mesh, optimizers):
    # 9.5e-7 and 1.5e-5 are the largest seen in 10 steps.
    for name, apart in process.run(train, mesh, optimizers).items():
        assert apart["loss"] < 1e-5, (name, apart)
        assert apart["weights_share"] < 2e-4, (name, apart)
        assert apart["slots_share"] < 2e-4, (name, apart)


def whole_softmax(mesh):
    """Losses, logits, bytes of a table; on the mesh and on one device."""
    found, meshed = [], strategy_of(mesh)
    rng = np.random.default_rng(0)
    tokens_BL = rng.integers(1, VOCABULARY, (8, 5)).astype("int32")
    target_BL = rng.integers(1, VOCABULARY, (8, 5)).astype("int32")
    batch = {"tokens": tokens_BL, "targets": target_BL}, target_BL
    for strategy in (meshed, None):
        keras.backend.clear_session()
        keras.utils.set_random_seed(0)
        with strategy.scope() if strategy else contextlib.nullcontext():
            model = LanguageModel(
                "MoE-4", VOCABULARY, width=WIDTH, k=2, dropout=0.0
            )
            scorer = NextWordScorer(model)
            scorer.build()
            scorer.compile_for_words(
                keras.optimizers.Adam(0.1), jit_compile=False
            )
        losses = [
            float(scorer.train_on_batch(*batch)[0]),
            float(scorer.test_on_batch(*batch)[0]),
        ]
        logits_BLV = model.predict(tokens_BL, verbose=0)
        rows = strategy.summary(scorer) if strategy else []
        held = {row.shape: row.bytes_per_device for row in rows}
        found.append((losses, logits_BLV, held.get((VOCABULARY, WIDTH))))
    return found


@pytest.mark.parametrize(
    "mesh", [BATCH_4, pytest.param(SQUARE, marks=pytest.mark.slow)]
)
def test_the_whole_softmax_equals_one_device(mesh):
    (losses, logits_BLV, held), one = process.run(whole_softmax, mesh)
    want, want_BLV, _ = one
    assert want[1] < want[0] - 0.1
    assert losses == pytest.approx(want, rel=1e-5)
    np.testing.assert_allclose(logits_BLV, want_BLV, atol=1e-3)
    axes, axis = mesh
    assert held == 4 * VOCABULARY * WIDTH // dict(axes)[axis]
