import json
import os
import shutil

import pytest

from moe_tf.data.text import preparation

TRAIN = "a a a b\nb c <UNK>\n\na b c d e f g\n"


@pytest.fixture
def config(tmp_path, data_config):
    texts = {"train.txt": TRAIN, "valid.txt": "a z\n", "test.txt": "b\n"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    return data_config(
        corpus="files",
        train=str(tmp_path / "train.txt"),
        validation=str(tmp_path / "valid.txt"),
        test=str(tmp_path / "test.txt"),
        max_words=5,
        vocabulary_size=6,
    )


@pytest.fixture
def workdir(tmp_path):
    return str(tmp_path / "run")


def test_one_pass_counts_everything(config, workdir):
    prepared = preparation.prepare_text(config, workdir)
    assert prepared.vocabulary.words[4:] == ("a", "b")
    train = prepared.statistics["train"]
    assert train == preparation.SplitStatistics(
        files=[("train.txt", len(TRAIN))],
        lines=2,
        words=4 + 1 + 3 + 1,
        unknown_words=2,  # c and the literal <UNK>
        skipped={"blank": 1, "not_utf8": 0, "too_long": 1},
        lengths={3: 1, 4: 1},
    )
    assert train.unknown_rate == 2 / 7
    assert prepared.statistics["validation"].unknown_rate == 1 / 2
    assert prepared.statistics["test"].unknown_rate == 0


def test_statistics_survive_json(config, workdir):
    for found in preparation.prepare_text(config, workdir).statistics.values():
        text = json.dumps(found.to_json())
        again = preparation.SplitStatistics.from_json(json.loads(text))
        assert again == found


def test_the_second_call_loads_without_counting(config, workdir, monkeypatch):
    first = preparation.prepare_text(config, workdir)
    before = {
        name: os.stat(os.path.join(workdir, name)).st_mtime_ns
        for name in ("vocabulary.txt", "data.json")
    }
    monkeypatch.setattr(preparation, "_count", None)
    second = preparation.prepare_text(config, workdir)
    assert second.statistics == first.statistics
    assert second.vocabulary.words == first.vocabulary.words
    for name, modified in before.items():
        assert os.stat(os.path.join(workdir, name)).st_mtime_ns == modified


def test_a_run_cut_short_begins_again(config, workdir):
    first = preparation.prepare_text(config, workdir)
    os.remove(os.path.join(workdir, "data.json"))
    with open(os.path.join(workdir, "vocabulary.txt"), "w") as file:
        file.write("half")
    second = preparation.prepare_text(config, workdir)
    assert second.vocabulary.fingerprint == first.vocabulary.fingerprint


@pytest.mark.thorough
def test_a_moved_run_still_loads(
    sotu_prepared, sotu_workdir, data_config, tmp_path
):
    moved = tmp_path / "moved"
    shutil.copytree(sotu_workdir, moved)
    again = preparation.prepare_text(data_config(), str(moved))
    assert again.statistics == sotu_prepared.statistics


def test_another_vocabulary_is_refused(config, workdir):
    preparation.prepare_text(config, workdir)
    path = os.path.join(workdir, "vocabulary.txt")
    with open(path, "a") as file:
        file.write("more\n")
    with pytest.raises(ValueError, match=f"{path} has changed.*fingerprint"):
        preparation.prepare_text(config, workdir)


@pytest.mark.parametrize(
    "name,split",
    [("train.txt", "train"), ("valid.txt", "validation"), ("test.txt", "test")],
)
def test_a_source_of_another_size_is_refused(
    config, workdir, tmp_path, name, split
):
    preparation.prepare_text(config, workdir)
    with open(tmp_path / name, "a") as file:
        file.write("a\n")
    with pytest.raises(ValueError, match=f"{name} of the {split} split"):
        preparation.prepare_text(config, workdir)


def test_another_source_is_refused(config, workdir, tmp_path):
    preparation.prepare_text(config, workdir)
    (tmp_path / "other.txt").write_text(TRAIN)
    config.train += f",{tmp_path}/other.txt"
    with pytest.raises(ValueError, match="files of the train split.*other"):
        preparation.prepare_text(config, workdir)


@pytest.mark.parametrize(
    "field,value", [("max_words", 4), ("vocabulary_size", 7)]
)
def test_another_setting_is_refused(config, workdir, field, value):
    preparation.prepare_text(config, workdir)
    config[field] = value
    with pytest.raises(ValueError, match=f"`data.{field}`={value} differs"):
        preparation.prepare_text(config, workdir)


def test_nothing_is_recorded_of_a_corpus_that_fails(config, workdir, tmp_path):
    (tmp_path / "test.txt").write_text("\n")
    with pytest.raises(ValueError, match="`data.test` names"):
        preparation.prepare_text(config, workdir)
    assert not os.path.exists(workdir) or not os.listdir(workdir)


def test_the_embedded_corpus(sotu_prepared):
    assert sotu_prepared.vocabulary.size == 20_000
    assert sotu_prepared.vocabulary.words[4:7] == ("the", "of", ",")
    rates = [
        sotu_prepared.statistics[split].unknown_rate
        for split in ("train", "validation", "test")
    ]
    assert 0.005 < rates[0] < 0.01 < min(rates[1:]) < max(rates) < 0.02
