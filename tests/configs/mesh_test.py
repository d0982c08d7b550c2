"""Every config trains on a mesh when its flags ask for one."""

import keras
import pytest

from moe_tf.training import loop
from moe_tf.training import meshes
from moe_tf.training import tasks
from tests.configs import configs_test
from tests.distribute import process


def train(name, path, workdir):
    config = configs_test.config_of(name, "tiny")
    if config.data.corpus == "lm1b":
        config.data.path = path
    config.update_from_flattened_dict({"mesh.batch": 2, "mesh.expert": 2})
    config.data.max_words = 7  # One length, so one program.
    keras.utils.set_random_seed(config.seed)
    task = tasks.LanguageModelTask(config, meshes.strategy(config))
    loop.train(task, config, workdir)


@pytest.mark.parametrize("name", configs_test.NAMES)
def test_tiny_form_trains_on_a_mesh(name, tmp_path):
    configs_test.write_benchmark(tmp_path)
    workdir = tmp_path / "run"
    process.run(train, name, str(tmp_path), str(workdir))
    assert len((workdir / "history.csv").read_text().splitlines()) == 3
    assert list(workdir.glob("checkpoints/last/step-*"))
