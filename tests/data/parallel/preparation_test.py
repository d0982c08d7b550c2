import contextlib
import errno
import json
import os
import shutil

import numpy as np
import pytest
import tensorflow as tf

from moe_tf import files
from moe_tf.data.parallel import preparation
from moe_tf.data.parallel import store as pair_store
from moe_tf.data.parallel import wordpieces
from tests.data.parallel import files as parallel_files


@pytest.fixture
def config(tmp_path):
    return parallel_files.write(
        tmp_path, {"en-de": (60, 7, 9), "fr-en": (40, 5, 6)}
    )


@pytest.fixture
def workdir(tmp_path):
    return str(tmp_path / "run")


def decoded(prepared, split, name):
    """The texts of a store, source and target."""
    store = prepared.stores[split][name]
    rows = [
        np.split(ids, [source])
        for ids, (source, _) in zip(
            np.split(store.ids.astype(np.int32), store.offsets[1:]),
            store.lengths,
            strict=True,
        )
    ]
    return list(
        zip(
            *(
                prepared.wordpieces.decode(
                    tf.ragged.constant(side, tf.int32, 1).to_tensor()
                ).numpy()
                for side in zip(*rows, strict=True)
            ),
            strict=True,
        )
    )


def test_every_split_is_encoded_and_counted(config, workdir):
    prepared = preparation.prepare_pairs(config, workdir)
    assert prepared.wordpieces.size == 80
    assert prepared.wordpieces.languages == ("de", "en")
    for split, name, count in (
        ("train", "en-de", 60),
        ("validation", "fr-en", 5),
        ("test", "en-de", 9),
    ):
        pair = prepared.corpus.pair(name)
        want = list(prepared.corpus.lines(pair, split))
        assert decoded(prepared, split, name) == want
        found = prepared.statistics[split][name]
        lengths = prepared.stores[split][name].lengths
        assert found == preparation.PairStatistics(
            sources=prepared.corpus.sizes(pair, split),
            pairs=count,
            source_pieces=lengths[:, 0].sum() + count,
            target_pieces=lengths[:, 1].sum() + count,
            unknown_pieces=0,
            longest=lengths.max() + 1,
            skipped={
                "blank": 0,
                "not_utf8": 0,
                "too_long": 0,
                "too_many_pieces": 0,
            },
        )


def test_unknown_characters_are_counted(config, workdir, tmp_path):
    path = tmp_path / "validation.en-de.de"
    rows = path.read_text().split("\n")
    path.write_text("\n".join(["日本 katze 日", *rows[1:]]))
    prepared = preparation.prepare_pairs(config, workdir)
    assert prepared.statistics["validation"]["en-de"].unknown_pieces == 2


def test_languages_have_symbols_only_if_there_are_several(config, workdir):
    config.pairs = "en-de"
    prepared = preparation.prepare_pairs(config, workdir)
    assert prepared.wordpieces.languages == ()
    assert prepared.source_prefix() == prepared.source_prefix("de") == ()
    with pytest.raises(ValueError, match=r"`language`.*\['de'\].*'en'"):
        prepared.source_prefix("en")


def test_a_language_must_be_named_if_there_are_several(config, workdir):
    prepared = preparation.prepare_pairs(config, workdir)
    assert prepared.source_prefix("en") == (5,)
    for wrong in (None, "fr"):
        with pytest.raises(ValueError, match=r"`language`.*\['de', 'en'\]"):
            prepared.source_prefix(wrong)


@pytest.mark.parametrize("names", ["en-de", "en-de,fr-en"])
def test_long_pairs_are_left_out_of_training_alone(
    config, workdir, names, caplog
):
    config.pairs = names
    has_symbol = "," in names
    whole = preparation.prepare_pairs(config, f"{workdir}/whole")
    config.max_pieces = 20
    prepared = preparation.prepare_pairs(config, f"{workdir}/short")
    lengths = whole.stores["train"]["en-de"].lengths
    fits = (lengths[:, 0] + has_symbol < 20) & (lengths[:, 1] < 20)
    assert 5 < fits.sum() < 55
    np.testing.assert_array_equal(
        prepared.stores["train"]["en-de"].lengths, lengths[fits]
    )
    kept = decoded(prepared, "train", "en-de")
    assert kept == [
        row
        for row, fit in zip(decoded(whole, "train", "en-de"), fits, strict=True)
        if fit
    ]
    found = prepared.statistics["train"]["en-de"]
    assert found.pairs == fits.sum()
    assert found.skipped["too_many_pieces"] == 60 - fits.sum()
    assert found.longest == lengths[fits].max() + 1
    assert f"{60 - fits.sum()} of 60 lines skipped as too_many" in caplog.text
    for split in ("validation", "test"):
        assert (
            prepared.statistics[split]["en-de"]
            == whole.statistics[split]["en-de"]
        )


def test_a_limit_that_leaves_nothing_is_refused(config, workdir):
    config.max_pieces = 2
    with pytest.raises(ValueError, match="`data.max_pieces`=2 leaves no pair"):
        preparation.prepare_pairs(config, workdir)
    config.max_pieces = 1
    with pytest.raises(
        ValueError, match="`data.max_pieces` must be.* at least 2"
    ):
        preparation.prepare_pairs(config, workdir)


def test_chunks_do_not_show(config, workdir, monkeypatch):
    config.max_pieces = 30
    whole = preparation.prepare_pairs(config, f"{workdir}/whole")
    monkeypatch.setattr(preparation, "_CHUNK", 7)
    chunked = preparation.prepare_pairs(config, f"{workdir}/chunked")
    assert chunked.statistics == whole.statistics
    assert whole.statistics["train"]["en-de"].skipped["too_many_pieces"]
    for name in ("en-de.train.ids", "fr-en.train.lengths"):
        both = [
            open(f"{workdir}/{run}/pairs/{name}", "rb").read()
            for run in ("chunked", "whole")
        ]
        assert both[0] == both[1]


def test_the_second_call_loads_without_encoding(config, workdir, monkeypatch):
    first = preparation.prepare_pairs(config, workdir)
    monkeypatch.setattr(wordpieces.Wordpieces, "encode_lines", None)
    monkeypatch.setattr(wordpieces.Wordpieces, "learn", None)
    second = preparation.prepare_pairs(config, workdir)
    assert second.statistics == first.statistics
    assert second.wordpieces.model == first.wordpieces.model
    for split in ("train", "validation", "test"):
        assert decoded(second, split, "fr-en") == decoded(first, split, "fr-en")


def test_statistics_survive_json(config, workdir):
    for by_pair in preparation.prepare_pairs(
        config, workdir
    ).statistics.values():
        for found in by_pair.values():
            fields = json.loads(json.dumps(found.to_json()))
            assert preparation.PairStatistics.from_json(fields) == found


def test_a_moved_run_still_loads(config, workdir, tmp_path):
    first = preparation.prepare_pairs(config, workdir)
    shutil.move(workdir, tmp_path / "moved")
    again = preparation.prepare_pairs(config, str(tmp_path / "moved"))
    assert again.statistics == first.statistics


def test_a_run_cut_short_begins_again(config, workdir, monkeypatch):
    want = preparation.prepare_pairs(config, f"{workdir}/whole")

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "_write_record", stop)
        with pytest.raises(KeyboardInterrupt):
            preparation.prepare_pairs(config, workdir)
    with open(f"{workdir}/pairs/en-de.train.ids", "wb") as file:
        file.write(b"half")
    prepared = preparation.prepare_pairs(config, workdir)
    assert prepared.statistics == want.statistics
    assert decoded(prepared, "train", "en-de") == decoded(
        want, "train", "en-de"
    )


def test_a_full_disk_is_said_with_the_file(config, workdir, monkeypatch):
    real = files.replace

    @contextlib.contextmanager
    def full(path):
        with real(path) as file:
            if str(path).endswith("fr-en.train.ids"):

                class Full:
                    def write(self, data):
                        raise OSError(errno.ENOSPC, "No space left on device")

                yield Full()
            else:
                yield file

    monkeypatch.setattr(files, "replace", full)
    with pytest.raises(OSError, match="No space left.*fr-en.train"):
        preparation.prepare_pairs(config, workdir)
    assert not os.path.exists(f"{workdir}/data.json")
    assert not [n for n in os.listdir(f"{workdir}/pairs") if "tmp" in n]
    monkeypatch.undo()
    assert preparation.prepare_pairs(config, workdir).statistics


def test_held_out_text_is_checked_before_long_work(
    config, workdir, tmp_path, monkeypatch
):
    with open(tmp_path / "test.fr-en.fr", "a") as file:
        file.write("une de plus\n")
    monkeypatch.setattr(wordpieces.Wordpieces, "learn", None)
    with pytest.raises(ValueError, match="`data.test`.*7 lines and .* of 6"):
        preparation.prepare_pairs(config, workdir)
    assert not os.path.exists(workdir)


@pytest.mark.parametrize(
    "field,value,message",
    [
        ("max_pieces", 63, "`data.max_pieces`=63 differs from 64"),
        ("vocabulary_size", 81, "`data.vocabulary_size`=81 differs"),
        ("pairs", "en-de", r"`data.pairs` lists \['en-de'\], but"),
        ("pairs", "fr-en,en-de", "`data.pairs`.*in this order"),
    ],
)
def test_another_setting_is_refused(config, workdir, field, value, message):
    preparation.prepare_pairs(config, workdir)
    config[field] = value
    with pytest.raises(ValueError, match=message):
        preparation.prepare_pairs(config, workdir)


def test_other_weights_are_fine(config, workdir):
    preparation.prepare_pairs(config, workdir)
    config.pairs = "en-de:1,fr-en:3"
    prepared = preparation.prepare_pairs(config, workdir)
    assert [pair.weight for pair in prepared.corpus.pairs] == [1, 3]


@pytest.mark.parametrize(
    "name", ["train.en-de.en", "validation.fr-en.en", "test.en-de.de"]
)
def test_a_changed_source_is_refused(config, workdir, tmp_path, name):
    preparation.prepare_pairs(config, workdir)
    with open(tmp_path / name, "a") as file:
        file.write("more\n")
    with pytest.raises(ValueError, match=f"{name} of the .* has changed"):
        preparation.prepare_pairs(config, workdir)


@pytest.mark.parametrize(
    "name,message",
    [
        ("pairs/en-de.train.ids", "en-de.train.ids in .*pairs has changed"),
        ("pairs/fr-en.test.lengths", "fr-en.test.lengths in .* has changed"),
        ("wordpieces.model", "wordpieces.model has changed.*fingerprint"),
    ],
)
def test_a_changed_file_of_the_run_is_refused(config, workdir, name, message):
    prepared = preparation.prepare_pairs(config, workdir)
    if name == "wordpieces.model":
        other = wordpieces.Wordpieces.learn(
            [b"an other text of some more words"], 40
        )
        other.save(f"{workdir}/{name}")
    else:
        with open(f"{workdir}/{name}", "ab") as file:
            file.write(b"0")
    with pytest.raises(ValueError, match=message):
        preparation.prepare_pairs(config, workdir)
    del prepared
    os.remove(f"{workdir}/{name}")
    with pytest.raises((ValueError, FileNotFoundError), match=name[-9:]):
        preparation.prepare_pairs(config, workdir)


def test_the_folder_of_another_task_is_refused(config, workdir):
    os.makedirs(workdir)
    with open(f"{workdir}/data.json", "w") as file:
        json.dump({"settings": {"max_words": 3}, "vocabulary": {}}, file)
    with pytest.raises(ValueError, match="not of a run with sentence pairs"):
        preparation.prepare_pairs(config, workdir)


@pytest.mark.parametrize("size,dtype", [(65536, "<u2"), (65537, "<u4")])
def test_ids_take_the_bytes_that_they_need(tmp_path, size, dtype):
    chunks = [
        (np.array([size - 1, 7, 8]), np.array([[1, 2]])),
        (np.array([], int), np.array([[0, 0]])),
        (np.array([9]), np.array([[0, 1]])),
    ]
    path = str(tmp_path / "a")
    store = pair_store.PairStore.write(path, size, iter(chunks))
    assert store.ids.dtype == dtype
    assert store.ids.tolist() == [size - 1, 7, 8, 9]
    assert store.lengths.tolist() == [[1, 2], [0, 0], [0, 1]]
    assert store.offsets.tolist() == [0, 3, 3]
    assert len(store) == 3
    assert store.sizes == {"a.ids": 4 * int(dtype[2]), "a.lengths": 24}


def test_an_empty_store_reads(tmp_path):
    store = pair_store.PairStore.write(str(tmp_path / "a"), 9, [])
    assert len(store) == len(store.ids) == len(store.offsets) == 0
