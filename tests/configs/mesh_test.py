"""Every config trains on a mesh when its flags ask for one."""

import keras
import pytest

from moe_tf.training import loop
from moe_tf.training import meshes
from moe_tf.training.language.task import LanguageModelTask
from moe_tf.training.translation.task import TranslationTask
from tests import process
from tests import small_text
from tests.configs import configs_test

FLAGS = {"mesh.batch": 2, "mesh.expert": 2}


def train(task_class, config, workdir):
    keras.utils.set_random_seed(config.seed)
    task = task_class(config, meshes.make_strategy(config))
    loop.train(task, config, workdir)


def trained(workdir):
    """Whether two steps were told and saved."""
    history = (workdir / "history.csv").read_text().splitlines()
    return len(history) == 3 and any(workdir.glob("checkpoints/last/step-*"))


@pytest.mark.parametrize(
    "name",
    configs_test.LANGUAGE_MODELS,
)
@pytest.mark.slow  # `tests/training/mesh_training_test.py` has the demo's
def test_tiny_form_trains_on_a_mesh(name, tmp_path):
    config = configs_test.config_of(name, "tiny")
    if config.data.corpus == "lm1b":
        configs_test.write_benchmark(tmp_path)
        config.data.path = str(tmp_path)
    config.update_from_flattened_dict(FLAGS)
    config.data.max_words = 7  # One length, so one program.
    workdir = tmp_path / "run"
    process.run(train, LanguageModelTask, config, str(workdir))
    assert trained(workdir)


# Of one pair of languages the tiny forms are one (`configs_test.py`), so these
# are the others at its sizes, with experts of every kind.
SIZES = {
    "model.width": 16,
    "data.max_pieces": 32,
    "data.batch_tokens": 384,
    "train.steps": 2,
    "train.evaluate_every": 1,
    "train.log_every": 1,
}
FORMS = {
    ("mt_demo", "tiny"): {},
    ("mt_libreoffice", "tiny"): {},
    ("mt_libreoffice", "MoE"): {"model.encoder_layers": 2},
    ("mt_multi30k", "GNMT-MoE-8"): {},
    ("mt_wmt14", "GNMT-MoE-4x2-h"): {},
    ("mt_wmt14", "GNMT-multi-4"): {},
}


@pytest.mark.parametrize("name,arg", FORMS)
@pytest.mark.slow  # `tests/training/translation_mesh_test.py` has the models
def test_translation_trains_on_a_mesh(name, arg, tmp_path):
    config = configs_test.config_of(name, arg)
    pairs = "en-de,en-fr" if name == "mt_libreoffice" else "en-de"
    config.data.update(small_text.write(tmp_path), pairs=pairs)
    config.data.vocabulary_size = 250  # Few lengths, so few programs.
    config.update_from_flattened_dict({**SIZES, **FORMS[name, arg], **FLAGS})
    workdir = tmp_path / "run"
    process.run(train, TranslationTask, config, str(workdir), timeout=600)
    assert trained(workdir)
