"""The trainer on meshes: the same run as on one device, whatever happens."""

import csv
import functools
import pathlib
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf

from moe_tf.training import checkpoints
from moe_tf.training import loop
from moe_tf.training import meshes
from moe_tf.training import variables
from moe_tf.training.language.task import LanguageModelTask
from moe_tf_configs import lm_demo
from tests import process

STEPS = 8
DENSE, MOE = "4xLSTM-512", "MoE-4"
TWO = (("batch", 2),)
FOUR = (("batch", 4),)
SQUARE = (("batch", 2), ("expert", 2))
VARIANTS = {(): (DENSE, MOE), TWO: (MOE,), FOUR: (DENSE, MOE), SQUARE: (MOE,)}
QUICK = ((SQUARE, MOE),)


def config_of(variant, axes):
    """Dropout, sampled softmax, noise, and drops."""
    config = lm_demo.get_config("tiny")
    config.data.update(max_words=7, batch_words=160, rows_multiple=8)
    config.model.variant = variant
    if variant == MOE:
        config.moe.update(k=2, capacity_factor=1.0, num_groups=4)
    config.train.update(steps=STEPS, evaluate_every=STEPS // 2)
    config.mesh.update(axes)
    return config


def train(config, strategy, workdir):
    keras.backend.clear_session()
    keras.utils.set_random_seed(config.seed)
    task = LanguageModelTask(config, strategy)
    loop.train(task, config, str(workdir))


def train_one(axes, variant, folder):
    """Trains a variant; on one mesh goes on from the middle once more."""
    config = config_of(variant, axes)
    strategy = meshes.make_strategy(config)
    workdir = pathlib.Path(folder, variant)
    train(config, strategy, workdir)
    if axes != dict(SQUARE):
        return
    # As a run that was killed after the middle had been saved.
    again = shutil.copytree(workdir, pathlib.Path(folder, "resumed"))
    shutil.rmtree(again / "checkpoints/last" / f"step-{STEPS:08d}")
    train(config, strategy, again)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, seed_corpus):
    folder = tmp_path_factory.mktemp("runs")

    @functools.cache
    def run(axes, variant):
        path = folder / str(axes)
        seed_corpus(path / variant)
        process.run(train_one, dict(axes), variant, str(path))
        return path

    return run


def history(workdir):
    with open(workdir / "history.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["words_per_second"]
    return [{name: float(row[name]) for name in row} for row in rows]


def final_state(workdir):
    path = workdir / f"checkpoints/last/step-{STEPS:08d}/variables"
    return tensors(path)


def tensors(path):
    reader = tf.train.load_checkpoint(str(path))
    return {
        name: reader.get_tensor(name)
        for name in reader.get_variable_to_shape_map()
        if name.startswith("variables/")
    }


@pytest.mark.thorough
@pytest.mark.parametrize(
    "axes,variant",
    [
        pytest.param(
            axes,
            name,
            marks=[] if (axes, name) in QUICK else pytest.mark.slow,
            id=f"{axes}-{name}",
        )
        for axes, names in VARIANTS.items()
        if axes
        for name in names
    ],
)
def test_equals_one_device(runs, axes, variant):
    one, mesh = (runs(a, variant) / variant for a in ((), axes))
    want, got = history(one), history(mesh)
    assert len(got) == 2
    assert want[1]["val_loss"] < want[0]["val_loss"]
    if variant == MOE:
        assert want[0]["moe_dropped_fraction"] > 0.02
    for row, other in zip(got, want, strict=True):
        assert row == pytest.approx(other, rel=1e-5)
    state, other = final_state(mesh), final_state(one)
    assert state.keys() == other.keys()
    for name, value in other.items():
        np.testing.assert_allclose(
            state[name], value, rtol=1e-5, atol=1e-6, err_msg=name
        )


@pytest.mark.thorough
def test_an_interrupted_run_ends_with_the_same_bits(runs):
    folder = runs(SQUARE, MOE)
    want = final_state(folder / MOE)
    got = final_state(folder / "resumed")
    assert len(history(folder / "resumed")) == 3  # The last half twice.
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def evaluate_on(axes, workdir):
    """What all modes but training say of a run, on another mesh."""
    config = config_of(MOE, axes)
    task = LanguageModelTask(config, meshes.make_strategy(config))
    prepared, scorer = loop.restore_run(task, config, workdir)
    figures = scorer.evaluate(
        task.batches(prepared, "test"),
        steps=task.num_batches(prepared, "test"),
        return_dict=True,
        verbose=0,
    )
    sentences = [b"The people of the States .", b"We are here ."]
    (_, _, weights_BL), nll_BL = task.score(scorer, sentences, prepared)
    scores = np.sum(weights_BL * nll_BL, axis=1)[: len(sentences)]
    return figures["perplexity"], task.sample(scorer, prepared), scores


@pytest.mark.slow
@pytest.mark.parametrize("axes", (FOUR, TWO), ids=str)
def test_a_run_is_used_on_any_mesh(runs, axes):
    workdir = str(runs(SQUARE, MOE) / MOE)
    want = process.run(evaluate_on, {}, workdir)
    got = process.run(evaluate_on, dict(axes), workdir)
    assert got[0] == pytest.approx(want[0], rel=1e-6)
    assert got[1] == want[1]
    np.testing.assert_allclose(got[2], want[2], rtol=1e-5)


def pass_on(start, folder):
    """Restores a checkpoint on five meshes, each from the one before."""
    path = start
    # The largest first: it makes the devices.
    for number, axes in enumerate((FOUR, (), TWO, (("batch", 1),), SQUARE)):
        config = config_of(MOE, dict(axes))
        keras.utils.set_random_seed(number)
        keras.backend.clear_session()
        task = LanguageModelTask(config, meshes.make_strategy(config))
        prepared = task.prepare(str(pathlib.Path(folder, "run")))
        named = variables.named_variables(task.build(prepared))
        saved = checkpoints.Checkpoints(f"{folder}/{number}", named)
        saved.restore(path)
        path = saved.save(STEPS)
    return path


@pytest.mark.thorough
def test_five_meshes_and_back_give_the_same_bits(runs, tmp_path):
    run = runs(SQUARE, MOE) / MOE
    shutil.copytree(run, tmp_path / "run")
    start = run / f"checkpoints/last/step-{STEPS:08d}"
    end = process.run(pass_on, str(start), str(tmp_path))
    want = tensors(start / "variables")
    got = tensors(pathlib.Path(end) / "variables")
    assert len(want) > 20
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)
