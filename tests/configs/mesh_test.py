"""Every config trains on a mesh when its flags ask for one."""

import keras
import pytest

from moe_tf.training import loop
from moe_tf.training import meshes
from moe_tf.training.language_model_task import LanguageModelTask
from moe_tf.training.translation_task import TranslationTask
from tests import small_text
from tests.configs import configs_test
from tests.distribute import process


def train(name, path, workdir):
    config = configs_test.config_of(name, "tiny")
    if config.data.corpus == "lm1b":
        config.data.path = path
    config.update_from_flattened_dict({"mesh.batch": 2, "mesh.expert": 2})
    config.data.max_words = 7  # One length, so one program.
    keras.utils.set_random_seed(config.seed)
    task = LanguageModelTask(config, meshes.strategy(config))
    loop.train(task, config, workdir)


@pytest.mark.parametrize(
    "name",
    configs_test.LANGUAGE_MODELS,
)
@pytest.mark.slow  # `tests/training/mesh_training_test.py` has the demo's
def test_tiny_form_trains_on_a_mesh(name, tmp_path):
    configs_test.write_benchmark(tmp_path)
    workdir = tmp_path / "run"
    process.run(train, name, str(tmp_path), str(workdir))
    assert len((workdir / "history.csv").read_text().splitlines()) == 3
    assert list(workdir.glob("checkpoints/last/step-*"))


def translation(data, workdir, mesh):
    """Trains two steps; what is told of each, and of the test text."""
    config = configs_test.config_of("mt_demo", "tiny")
    config.data.update(data)
    config.update_from_flattened_dict(
        {
            "mesh.batch": mesh,
            "model.num_groups": 4,
            "model.capacity_factor": 1.0,
            "model.encoder_layers": 1,
            "model.decoder_layers": 1,
            "model.moe_every": 1,
            "data.rows_multiple": 8,
            "data.batch_tokens": 768,
        }
    )
    keras.utils.set_random_seed(config.seed)
    task = TranslationTask(config, meshes.strategy(config))
    prepared = task.prepare(workdir)
    scorer = task.build(prepared)
    history = scorer.fit(
        task.batches(prepared, "train"), steps_per_epoch=3, verbose=0
    )
    test = scorer.evaluate(
        task.batches(prepared, "test"),
        steps=task.num_batches(prepared, "test"),
        return_dict=True,
        verbose=0,
    )
    return {name: value[0] for name, value in history.history.items()}, test


def test_translation_on_a_mesh_equals_one_device(tmp_path):
    data = small_text.write(tmp_path)
    got, want = (
        process.run(translation, data, str(tmp_path / "run"), mesh)
        for mesh in (2, None)
    )
    for found, expected in zip(got, want, strict=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert got[1]["words"] > 300
