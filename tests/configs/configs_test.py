"""Every config builds; its `:tiny` form trains two steps."""

import importlib
import pathlib

import keras
import pytest

import moe_tf_configs
from moe_tf.training import loop
from moe_tf.training.language.task import LanguageModelTask
from moe_tf.training.translation.task import TranslationTask
from tests import sets
from tests import small_text

NAMES = sorted(
    path.stem
    for path in pathlib.Path(moe_tf_configs.__file__).parent.glob("*.py")
    if path.stem not in ("__init__", "base")
)
LANGUAGE_MODELS = [name for name in NAMES if name.startswith("lm")]
TRANSLATION = [name for name in NAMES if name.startswith("mt")]
FAMILY = (
    "4xLSTM-512",
    "LSTM-2048-512",
    "MoE-1-Wide",
    "MoE-1-Deep",
    "MoE-4",
    "MoE-32",
    "MoE-256",
)
TRANSLATION_FAMILY = (
    "Transformer",
    "Transformer-MoE-8",
    "GNMT",
    "GNMT-wide",
    "GNMT-MoE-32",
    "GNMT-MoE-2048-h",
    "GNMT-multi-512",
)


def test_every_config_is_of_a_trainer():
    assert sorted(LANGUAGE_MODELS + TRANSLATION) == NAMES


def config_of(name, *arg):
    return importlib.import_module(f"moe_tf_configs.{name}").get_config(*arg)


def write_benchmark(folder):
    """A few sentences in the layout of the 1-billion-word benchmark."""
    train = folder / "training-monolingual.tokenized.shuffled"
    held_out = folder / "heldout-monolingual.tokenized.shuffled"
    for directory in (train, held_out):
        directory.mkdir()
    text = "The cat sat on the mat .\nA dog barked at it .\n" * 20
    for shard in range(1, 100):
        (train / f"news.en-{shard:05d}-of-00100").write_text(text)
    for shard in range(2):
        name = f"news.en.heldout-{shard:05d}-of-00050"
        (held_out / name).write_text(text)


@pytest.mark.parametrize("arg", [(), *((name,) for name in FAMILY)])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_builds_and_fits_the_task(name, arg):
    config = config_of(name, *arg)
    task = LanguageModelTask(config)
    if arg:
        assert task.variant().name == arg[0]


@pytest.mark.parametrize(
    "name", [sets.slow("lm_demo"), sets.thorough("lm1b_moe")]
)
def test_tiny_form_trains_two_steps(name, tmp_path, capsys):
    config = config_of(name, "tiny")
    if config.data.corpus == "lm1b":
        write_benchmark(tmp_path)
        config.data.path = str(tmp_path)
    keras.utils.set_random_seed(config.seed)
    task = LanguageModelTask(config)
    loop.train(task, config, str(tmp_path / "run"))
    told = capsys.readouterr().out
    assert "step 2/2" in told
    assert "test perplexity" in told
    assert told.count("sample: ") == config.sample.num_sentences


@pytest.mark.parametrize("name", TRANSLATION)
def test_builds_and_fits_the_translation_task(name):
    args = [()]
    if name != "mt_libreoffice":
        args += [(variant,) for variant in TRANSLATION_FAMILY]
    else:
        args += [("dense",)]
    for arg in args:
        config = config_of(name, *arg)
        told = TranslationTask(config).dry_run_report()
        assert told.startswith(config.model.variant)


def test_the_tiny_forms_of_one_pair_are_one():
    tiny = config_of("mt_demo", "tiny").to_dict()
    for name in ("mt_multi30k", "mt_wmt14"):
        assert config_of(name, "tiny").to_dict() == tiny


@pytest.mark.parametrize(
    "arg,gating",
    [
        ("GNMT-MoE-2048-h", "batchwise"),
        ("GNMT-MoE-512-h", "batchwise"),
        ("GNMT-MoE-32", "batchwise"),
        ("GNMT", "noisy_top_k"),  # the default; there is no choice
        ("GNMT-multi-512", "noisy_top_k"),
    ],
)
def test_experts_of_one_language_pair_are_strictly_balanced(arg, gating):
    config = config_of("mt_wmt14", arg)
    assert TranslationTask(config).variant().name == arg
    assert config.moe.gating == gating


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mt_demo", "mt_libreoffice"])
def test_tiny_form_of_translation_trains_two_steps(name, tmp_path, capsys):
    config = config_of(name, "tiny")
    config.data.update(small_text.write(tmp_path))
    keras.utils.set_random_seed(config.seed)
    task = TranslationTask(config)
    loop.train(task, config, str(tmp_path / "run"))
    told = capsys.readouterr().out
    assert "step 2/2" in told
    for pair in config.data.pairs.split(","):
        assert f"test {pair}: perplexity" in told
        assert f"test {pair}: BLEU" in told
    shown = config.translate.shown * len(config.data.pairs.split(","))
    assert told.count("translation: ") == shown
