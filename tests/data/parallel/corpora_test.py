import gzip
import logging
import sys

import ml_collections
import pytest
import tensorflow_datasets as tfds

from moe_tf.data import lines
from moe_tf.data.parallel import corpora
from moe_tf.data.parallel import libreoffice_help

TEXTS = {"en": "one\ntwo\nthree\n", "de": "eins\nzwei\ndrei\n"}


def config(**fields):
    return ml_collections.ConfigDict(
        {
            "corpus": "files",
            "path": "",
            "train": "",
            "validation": "",
            "test": "",
            "pairs": "en-de",
            **fields,
        }
    )


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def files(folder, texts=TEXTS, ending="txt", **fields):
    """A config of three splits, whose train files have `texts`."""
    for language, text in texts.items():
        write(folder / f"train.{language}.{ending}", text)
        for split in ("validation", "test"):
            write(folder / f"{split}.{language}.txt", f"{split}\n")
    return config(
        train=f"{folder}/train.{{lang}}.{ending}",
        validation=f"{folder}/validation.{{lang}}.txt",
        test=f"{folder}/test.{{lang}}.txt",
        **fields,
    )


def read(corpus, split="train", pair=0, report=None):
    return list(corpus.lines(corpus.pairs[pair], split, report))


@pytest.mark.parametrize("ending", ["txt", "gz"])
def test_lines_of_two_files_make_pairs(tmp_path, ending):
    fields = files(tmp_path, ending=ending, pairs="en-de,de-en")
    corpus = corpora.open_parallel(fields, str(tmp_path))
    want = [(b"one", b"eins"), (b"two", b"zwei"), (b"three", b"drei")]
    assert read(corpus) == want
    assert read(corpus, pair=1) == [pair[::-1] for pair in want]
    assert read(corpus, "test") == [(b"test", b"test")]
    assert corpus.pair("de-en") is corpus.pairs[1]
    names = [name for name, _ in corpus.sizes(corpus.pairs[1], "train")]
    assert names == [f"train.de.{ending}", f"train.en.{ending}"]
    with pytest.raises(ValueError, match="`pair`.*'en-de', 'de-en'.*'en-fr'"):
        corpus.pair("en-fr")


def test_folders_name_a_pair_either_way_and_globs_go_together(tmp_path):
    for folder, languages in {
        "de-en": ("de", "en"),
        "en-fr": ("en", "fr"),
    }.items():
        for language in languages:
            for part in "ab":
                write(
                    tmp_path / folder / f"{part}.{language}",
                    f"{part} {folder} {language}\n",
                )
    pattern = f"{tmp_path}/{{pair}}/?.{{lang}}"
    fields = config(
        train=pattern, validation=pattern, test=pattern, pairs="en-de,fr-en"
    )
    corpus = corpora.open_parallel(fields, str(tmp_path))
    assert read(corpus) == [
        (b"a de-en en", b"a de-en de"),
        (b"b de-en en", b"b de-en de"),
    ]
    assert read(corpus, pair=1)[0] == (b"a en-fr fr", b"a en-fr en")


def test_a_text_of_several_pairs_comes_once(tmp_path):
    texts = {**TEXTS, "fr": "un\n\ntrois\n"}
    fields = files(tmp_path, texts, pairs="en-de,de-en,en-fr")
    corpus = corpora.open_parallel(fields, str(tmp_path))
    assert list(corpus.texts("train")) == (
        b"one eins two zwei three drei un trois".split()
    )


def test_what_cannot_be_used_is_skipped_and_counted(tmp_path):
    long = b"x" * (10 << 20)
    rows = [
        (b"\xef\xbb\xbffirst\r\n", b"\xef\xbb\xbferste\r\n"),
        (b"\n", b"blank source\n"),
        (b"blank target\n", b" \t\xc2\xa0\xe3\x80\x80\r\n"),
        (b"not utf-8\n", b"\xff\xfe\n"),
        (long + b"\n", b"long\n"),
        (b"a\xe2\x80\xa8b\x0cc\xc2\x85d\n", b"e\tf\rg\n"),
        (b"<2de> </S> \xe2\x96\x81\n", b"last, without end"),
    ]
    texts = {
        language: b"".join(row[side] for row in rows)
        for side, language in enumerate(("en", "de"))
    }
    fields = files(tmp_path, texts)
    report = lines.LineReport()
    corpus = corpora.open_parallel(fields, str(tmp_path))
    assert read(corpus, report=report) == [
        (b"first", b"erste"),
        (b"a\xe2\x80\xa8b\x0cc\xc2\x85d", b"e\tf\rg"),
        (b"<2de> </S> \xe2\x96\x81", b"last, without end"),
    ]
    assert report.lines == 3
    assert report.skipped == {"blank": 2, "not_utf8": 1, "too_long": 1}
    assert report.first == {
        "blank": f"{tmp_path}/train.en.txt:2",
        "not_utf8": f"{tmp_path}/train.de.txt:4",
        "too_long": f"{tmp_path}/train.en.txt:5",
    }


@pytest.mark.parametrize(
    "shorter,counts",
    [("en", "of 2 lines and .*train.de.txt of 3"), ("de", "of 3 .* of 2")],
)
def test_sides_of_different_lengths_are_both_named(tmp_path, shorter, counts):
    fields = files(tmp_path, {**TEXTS, shorter: "x\ny\n"})
    corpus = corpora.open_parallel(fields, str(tmp_path))
    with pytest.raises(ValueError, match=f"train.en.txt {counts}"):
        read(corpus)


@pytest.mark.parametrize("text", ["", "\n\n\n", " \n\t\n\u00a0\n"])
def test_files_without_a_pair_are_refused(tmp_path, text):
    fields = files(tmp_path, {"en": text, "de": text})
    corpus = corpora.open_parallel(fields, str(tmp_path))
    with pytest.raises(ValueError, match="train.en.txt and .*no usable pair"):
        read(corpus)


def test_a_cut_off_gzip_file_is_named(tmp_path):
    fields = files(tmp_path, ending="gz")
    whole = (tmp_path / "train.de.gz").read_bytes()
    (tmp_path / "train.de.gz").write_bytes(whole[:-9])
    corpus = corpora.open_parallel(fields, str(tmp_path))
    with pytest.raises(ValueError, match="train.de.gz, which is not a whole"):
        read(corpus)


def test_testing_on_trained_text_is_said(tmp_path, caplog):
    fields = files(tmp_path)
    fields.test = fields.train
    with caplog.at_level(logging.WARNING, logger="absl"):
        corpora.open_parallel(fields, str(tmp_path))
    assert "`data.test` names" in caplog.text
    assert "`data.validation`" not in caplog.text


@pytest.mark.parametrize(
    "text,pairs",
    [
        ("en-de", [("en", "de", None)]),
        (" en-de , de-en,", [("en", "de", None), ("de", "en", None)]),
        ("en-pt-BR", [("en", "pt-BR", None)]),
        (
            "pt-BR-en:2,zh-Hans-CN-ja:.5",
            [("pt-BR", "en", 2), ("zh-Hans-CN", "ja", 0.5)],
        ),
        ("src-trg:1e3", [("src", "trg", 1000)]),
    ],
)
def test_pairs_and_weights(text, pairs):
    found = corpora.parse_pairs(text)
    assert [(p.source, p.target, p.weight) for p in found] == pairs
    assert found[0].name == f"{pairs[0][0]}-{pairs[0][1]}"


@pytest.mark.parametrize(
    "text,message",
    [
        ("", "at least one"),
        (None, "at least one"),
        ("en", "such as en-de.*'en'"),
        ("en-de-fr", "'en-de-fr'"),
        ("EN-de", "begins with a small letter.*'EN-de'"),
        ("en-en", "two languages.*'en-en'"),
        ("en-de,en-de", "en-de twice"),
        ("en-de:0", "above 0.*'en-de:0'"),
        ("en-de:-1", "above 0"),
        ("en-de:x", "above 0"),
        ("en-de:", "above 0"),
        ("en-de:nan", "above 0"),
        ("en-de:inf", "above 0"),
        ("en-de:1,en-fr", "all pairs a weight or none"),
        ("../en-de", "'../en-de'"),
    ],
)
def test_wrong_pairs_are_named(text, message):
    with pytest.raises(ValueError, match=f"`data.pairs`.*{message}"):
        corpora.parse_pairs(text)


@pytest.mark.parametrize(
    "fields,error,message",
    [
        ({"corpus": "wmt"}, ValueError, "`data.corpus`.*'wmt'"),
        ({}, ValueError, "`data.train` must name files with {lang}.*''"),
        ({"train": "a.{lang},b"}, ValueError, "`data.train`.*{lang}"),
        ({"train": "x.{lang}"}, FileNotFoundError, "`data.train`.*x.en"),
        ({"train": "x*.{lang}"}, ValueError, "`data.train`.*no file"),
        (
            {"corpus": "libreoffice-help", "path": "nowhere"},
            FileNotFoundError,
            "`data.path`.*libreoffice_help.*'nowhere'",
        ),
    ],
)
def test_wrong_settings_are_named(tmp_path, fields, error, message):
    with pytest.raises(error, match=message):
        corpora.open_parallel(config(**fields), str(tmp_path))


def test_globs_of_different_numbers_are_refused(tmp_path):
    for name in ("a.en", "b.en", "a.de"):
        write(tmp_path / name, "x\n")
    with pytest.raises(ValueError, match="2 files in en and 1 in de"):
        corpora.open_parallel(
            config(train=f"{tmp_path}/*.{{lang}}"), str(tmp_path)
        )


def help_folder(folder, **columns):
    meta = "train\tp\th1\ndev\tq\th2\ntest\tr\th3\ntrain\tp\th4\n"
    write(folder / "meta.tsv.gz", meta)
    for language, text in columns.items():
        write(folder / f"{language}.txt.gz", text)
    return config(corpus="libreoffice-help", path=str(folder))


def test_a_folder_of_the_help_has_splits_and_gaps(tmp_path):
    fields = help_folder(
        tmp_path, en="a\nb\nc\nd\n", de="A\nB\nC\n\n", fr="1\n2\n3\n4\n"
    )
    fields.pairs = "en-de,fr-de,en-fr"
    corpus = corpora.open_parallel(fields, str(tmp_path))
    report = lines.LineReport()
    assert read(corpus, report=report) == [(b"a", b"A")]
    assert report.skipped["blank"] == 1
    assert read(corpus, "validation") == [(b"b", b"B")]
    assert read(corpus, "test", pair=1) == [(b"3", b"C")]
    assert read(corpus, pair=2) == [(b"a", b"1"), (b"d", b"4")]
    # What is untranslated in one pair may be translated in another.
    assert list(corpus.texts("train")) == [b"a", b"A", b"1", b"d", b"4"]


def test_the_help_is_made_in_the_folder_of_the_run(tmp_path, monkeypatch):
    made = []

    def make(languages, folder):
        made.append(languages)
        columns = dict.fromkeys(languages, "a\nb\nc\nd\n")
        help_folder(tmp_path / "run" / "corpus", **columns)
        assert folder == str(tmp_path / "run" / "corpus")

    monkeypatch.setattr(libreoffice_help, "write_corpus", make)
    fields = config(corpus="libreoffice-help", pairs="en-de,fr-en")
    corpus = corpora.open_parallel(fields, str(tmp_path / "run"))
    assert made == [["de", "en", "fr"]]
    assert read(corpus, pair=1) == [(b"a", b"a"), (b"d", b"d")]


def test_an_unknown_language_of_a_folder_is_named(tmp_path):
    fields = help_folder(tmp_path, en="a\n", de="A\n")
    fields.pairs = "en-fr"
    with pytest.raises(ValueError, match=r"'fr', but .* has \['de', 'en'\]"):
        corpora.open_parallel(fields, str(tmp_path))


def test_a_folder_of_unequal_files_is_refused(tmp_path):
    fields = help_folder(tmp_path, en="a\nb\nc\nd\n", de="A\nB\nC\n")
    corpus = corpora.open_parallel(fields, str(tmp_path))
    with pytest.raises(ValueError, match="de.txt.gz.*before line 4"):
        read(corpus)


@pytest.fixture
def prepared_wmt(tmp_path):
    """The real format of WMT in tensorflow_datasets, with made-up text."""
    with tfds.core.registered.skip_registration():

        class FakeWmt(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")
            name = "fake_wmt"
            url_infos = {}  # nothing is downloaded
            splits = {"train": 5, "validation": 2, "test": 3}

            def _info(self):
                return self.dataset_info_from_configs(
                    features=tfds.features.Translation(languages=("fr", "en")),
                    supervised_keys=("fr", "en"),
                )

            def _split_generators(self, dl_manager):
                return {
                    split: self._generate_examples(split, count)
                    for split, count in self.splits.items()
                }

            def _generate_examples(self, split, count):
                for index in range(count):
                    yield (
                        index,
                        {"en": f"{split} {index}", "fr": f"{index}: {split}"},
                    )

    def make(**splits):
        FakeWmt.splits = splits or FakeWmt.splits
        builder = FakeWmt(data_dir=tmp_path)
        builder.download_and_prepare()
        return builder

    return make


def test_tfds_gives_pairs_in_either_direction(
    prepared_wmt, tmp_path, monkeypatch
):
    builder = prepared_wmt()
    monkeypatch.setattr(tfds, "builder", lambda name, data_dir: builder)
    fields = config(corpus="tfds:fake_wmt/fr-en", pairs="fr-en,en-fr")
    corpus = corpora.open_parallel(fields, str(tmp_path))
    want = {(b"%d: train" % i, b"train %d" % i) for i in range(5)}
    assert set(read(corpus)) == want
    assert [pair[::-1] for pair in read(corpus, pair=1)] == read(corpus)
    assert len(read(corpus, "validation")) == 2
    assert len(read(corpus, "test")) == 3
    assert len(list(corpus.texts("train"))) == 10
    fields.pairs = "en-de"
    with pytest.raises(ValueError, match=r"'de', but .* has \['en', 'fr'\]"):
        corpora.open_parallel(fields, str(tmp_path))


def test_tfds_without_a_split_is_refused(prepared_wmt, tmp_path, monkeypatch):
    builder = prepared_wmt(train=3, test=2)
    monkeypatch.setattr(tfds, "builder", lambda name, data_dir: builder)
    fields = config(corpus="tfds:fake_wmt/fr-en", pairs="fr-en")
    with pytest.raises(ValueError, match=r"lacks the splits \['validation'\]"):
        corpora.open_parallel(fields, str(tmp_path))


def test_tfds_missing_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    fields = config(corpus="tfds:wmt14_translate/fr-en", pairs="fr-en")
    with pytest.raises(ImportError, match=r"pip install moe_tf\[tfds\]"):
        corpora.open_parallel(fields, str(tmp_path))
