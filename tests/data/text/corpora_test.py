import gzip
import logging
import sys

import pytest
import tensorflow_datasets as tfds

from moe_tf.data.text import corpora


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def test_files_plain_and_gzipped(tmp_path, data_config):
    for name in ("a.txt", "b.txt", "c.gz", "valid.txt", "test.txt"):
        write(tmp_path / name, f"{name}\n")
    config = data_config(
        corpus="files",
        train=f"{tmp_path}/?.txt,{tmp_path}/*.gz",
        validation=f"{tmp_path}/valid.txt",
        test=f"{tmp_path}/test.txt",
    )
    corpus = corpora.open_corpus(config, str(tmp_path))
    assert list(corpus.lines("train")) == [b"a.txt\n", b"b.txt\n", b"c.gz\n"]
    assert list(corpus.lines("train", order=[2, 0, 1]))[0] == b"c.gz\n"
    assert list(corpus.lines("validation")) == [b"valid.txt\n"]
    assert list(corpus.lines("test")) == [b"test.txt\n"]


def test_testing_on_trained_text_is_said(tmp_path, data_config, caplog):
    write(tmp_path / "a.txt", "one\n")
    write(tmp_path / "b.txt", "two\n")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    config = data_config(
        corpus="files",
        train=f"{tmp_path}/a.txt",
        validation=f"{tmp_path}/b.txt",
        test=f"{tmp_path}/link.txt",
    )
    with caplog.at_level(logging.WARNING, logger="absl"):
        corpora.open_corpus(config, str(tmp_path))
    assert "`data.test` names" in caplog.text
    assert "`data.validation`" not in caplog.text


def lm1b_layout(folder):
    held = folder / "heldout-monolingual.tokenized.shuffled"
    train = folder / "training-monolingual.tokenized.shuffled"
    for shard in range(1, 100):
        suffix = ".gz" if shard == 7 else ""
        path = train / f"news.en-{shard:05d}-of-00100{suffix}"
        write(path, f"train {shard}\n")
    for shard in range(3):
        path = held / f"news.en.heldout-{shard:05d}-of-00050"
        write(path, f"held {shard}\n")
    return train


def test_lm1b_uses_the_usual_shards(tmp_path, data_config):
    lm1b_layout(tmp_path)
    config = data_config(corpus="lm1b", path=str(tmp_path))
    corpus = corpora.open_corpus(config, str(tmp_path))
    assert list(corpus.lines("train")) == [
        b"train %d\n" % shard for shard in range(1, 100)
    ]
    assert list(corpus.lines("validation")) == [b"held 1\n"]
    assert list(corpus.lines("test")) == [b"held 0\n"]


def test_a_lost_shard_of_lm1b_is_named(tmp_path, data_config):
    (lm1b_layout(tmp_path) / "news.en-00042-of-00100").unlink()
    config = data_config(corpus="lm1b", path=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="`data.path`.*00042-of-00100"):
        corpora.open_corpus(config, str(tmp_path))


@pytest.mark.parametrize(
    "fields,error,message",
    [
        ({"corpus": "ptb"}, ValueError, "`data.corpus`.*lm1b.*'ptb'"),
        ({"corpus": "files"}, ValueError, "`data.train` must name"),
        ({"corpus": "lm1b"}, FileNotFoundError, "`data.path`"),
        ({"max_words": 0}, ValueError, "`data.max_words`.* data.max_words=0"),
    ],
)
def test_wrong_settings_are_named(
    tmp_path, data_config, fields, error, message
):
    with pytest.raises(error, match=message):
        corpora.open_corpus(data_config(**fields), str(tmp_path))


def test_an_unknown_split_is_refused(held_corpus):
    with pytest.raises(ValueError, match="`split`.*'valid'"):
        held_corpus([b"x\n"]).lines("valid")


@pytest.fixture
def prepared_lm1b(tmp_path):
    """The real lm1b format of tensorflow_datasets, with made-up sentences."""
    real = tfds.builder_cls("lm1b")

    with tfds.core.registered.skip_registration():

        class Lm1b(tfds.core.GeneratorBasedBuilder):
            VERSION = real.VERSION
            name = "lm1b"
            url_infos = {}  # nothing is downloaded

            def _info(self):
                return self.dataset_info_from_configs(
                    features=tfds.features.FeaturesDict(
                        {"text": tfds.features.Text()}
                    )
                )

            def _split_generators(self, dl_manager):
                return {
                    "train": self._generate_examples("train", 250),
                    "test": self._generate_examples("test", 21),
                }

            def _generate_examples(self, split, count):
                for index in range(count):
                    yield index, {"text": f"{split} {index}"}

    Lm1b(data_dir=tmp_path).download_and_prepare()
    return tmp_path


@pytest.mark.thorough
def test_tfds_splits_hold_each_sentence_once(
    prepared_lm1b, data_config, tmp_path
):
    config = data_config(corpus="tfds:lm1b", path=str(prepared_lm1b))
    corpus = corpora.open_corpus(config, str(tmp_path))
    train = list(corpus.lines("train"))
    held = [list(corpus.lines(split)) for split in ("validation", "test")]
    assert sorted(train) == sorted(b"train %d" % i for i in range(250))
    assert sorted(held[0] + held[1]) == sorted(
        b"test %d" % i for i in range(21)
    )
    assert min(map(len, held)) == 10
    assert list(corpus.lines("train")) == train  # and always in this order


def test_tfds_mock_data_reads(data_config, tmp_path):
    config = data_config(corpus="tfds:lm1b", path=str(tmp_path))
    with tfds.testing.mock_data(num_examples=20):
        corpus = corpora.open_corpus(config, str(tmp_path))
        assert len(corpus.sources["train"]) == 20
        assert 0 < len(list(corpus.lines("test"))) <= 20


def test_tfds_missing_names_the_extra(monkeypatch, data_config, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    config = data_config(corpus="tfds:lm1b")
    with pytest.raises(ImportError, match=r"pip install moe_tf\[tfds\]"):
        corpora.open_corpus(config, str(tmp_path))
