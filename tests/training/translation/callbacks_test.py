"""Figures and examples of translation reach the logs and TensorBoard."""

import keras
import pytest
from tensorboard.backend.event_processing import event_accumulator

from moe_tf import tags
from moe_tf.training import loop
from moe_tf.training.translation.task import TranslationTask
from moe_tf_configs import mt_demo
from tests import small_text


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = mt_demo.get_config("tiny")
    config.data.update(small_text.write(folder))
    config.data.pairs = "en-de,en-fr"
    config.data.vocabulary_size = 160
    config.translate.shown = 2
    keras.utils.set_random_seed(config.seed)
    loop.train(TranslationTask(config), config, str(folder / "run"))
    return folder / "run"


@pytest.mark.slow
def test_the_board_has_scores_and_examples_of_each_pair(workdir):
    board = event_accumulator.EventAccumulator(str(workdir / "validation"))
    board.Reload()
    scalars = board.Tags()["scalars"] + board.Tags()["tensors"]
    for pair in ("en-de", "en-fr"):
        for tag in (tags.bleu, tags.chrf, tags.signature, tags.translations):
            assert any(name.startswith(tag(pair)) for name in scalars)
        events = board.Tensors(f"{tags.translations(pair)}")
        assert [event.step for event in events] == [1, 2]
        examples = events[-1].tensor_proto.string_val
        assert len(examples) == 2
        source = small_text.sentences()[160]["en"]
        assert source in examples[0].decode()


@pytest.mark.thorough
def test_the_history_has_means_and_pairs(workdir):
    header, *rows = (workdir / "history.csv").read_text().splitlines()
    names = header.split(",")
    last = dict(zip(names, rows[-1].split(","), strict=True))
    by_pair = [float(last[f"val_bleu_{p}"]) for p in ("en-de", "en-fr")]
    assert float(last["val_bleu"]) == pytest.approx(sum(by_pair) / 2)
    assert 0 <= float(last["val_chrf"]) <= 100
