import gc
import sys

import numpy as np
import pytest
import tensorflow as tf

from moe_tf import special_ids
from moe_tf.data.parallel import wordpieces as wordpieces_lib
from moe_tf.data.parallel.wordpieces import Wordpieces

WORDS = "the cat sat on a mat , élan … ½ groß \u00a0: \u2028 日本 ﬁ Ａ".split(
    " "
)


def text(count, seed=0, words=WORDS):
    random = np.random.default_rng(seed)
    return [
        " ".join(random.choice(words, random.integers(3, 12))).encode()
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def pieces():
    return Wordpieces.learn(text(400), 70, ["de", "pt-BR"])


def test_symbols_have_fixed_ids(pieces):
    assert pieces.size == len(pieces.pieces) == 70
    assert (
        special_ids.PAD,
        special_ids.UNK,
        special_ids.START,
        special_ids.END,
    ) == (0, 1, 2, 3)
    assert pieces.pieces[:7] == (
        *("<pad>", "<UNK>", "<S>", "</S>", "<2de>", "<2pt-BR>"),
        pieces.pieces[6],
    )
    assert pieces.languages == ("de", "pt-BR")
    assert pieces.language_id("pt-BR") == 5
    assert pieces.control_ids == (0, 2, 4, 5)
    with pytest.raises(ValueError, match="`language`.*'de', 'pt-BR'.*'fr'"):
        pieces.language_id("fr")
    assert Wordpieces.learn(text(400), 70).languages == ()


@pytest.mark.parametrize("num_lines", [1, 400])
def test_known_characters_come_back(pieces, num_lines):
    lines = text(num_lines, seed=1)
    ids = pieces.encode(lines)
    assert not tf.reduce_any(ids.flat_values < 6)
    assert pieces.decode(ids.to_tensor()).numpy().tolist() == lines


@pytest.mark.parametrize(
    "line,back",
    [
        ("the\tcat\r\n", "the cat"),
        ("  the   cat ", "the cat"),
        ("the\u2028cat", "the\u2028cat"),
        ("", ""),
        (" \t ", ""),
    ],
)
def test_whitespace_alone_changes(pieces, line, back):
    assert pieces.decode(pieces.encode([line]).to_tensor()) == back.encode()


def test_a_blank_sign_is_an_underscore():
    learned = Wordpieces.learn(text(99, words=["a_b", "c"]), 10)
    ids = learned.encode(["a▁b"])
    assert learned.decode(ids.to_tensor()) == b"a_b"


@pytest.mark.parametrize("name", ["<2de>", "</S>", "<S>", "<pad>", "<UNK>"])
def test_names_of_symbols_in_a_text_are_text(name):
    words = [name, "a", *name]
    learned = Wordpieces.learn(text(500, words=words), 13, ["de"])
    ids = learned.encode([f"a {name}{name} a", name])
    assert not set(ids.flat_values.numpy()) & {0, 1, 2, 3, 4}
    assert learned.decode(ids.to_tensor())[0] == f"a {name}{name} a".encode()


def test_decoding_stops_at_the_end_and_drops_symbols(pieces):
    the, cat = pieces.encode(["the", "cat"]).to_list()
    rows = [
        [
            special_ids.START,
            4,
            *the,
            special_ids.PAD,
            *cat,
            special_ids.END,
            *the,
        ],
        [special_ids.END, *the],
        [*the, special_ids.UNK, *cat],
        [special_ids.PAD, special_ids.PAD],
    ]
    ids_BL = tf.ragged.constant(rows).to_tensor(special_ids.PAD)
    want = [b"the cat", b"", "the ⁇  cat".encode(), b""]
    assert pieces.decode(ids_BL).numpy().tolist() == want
    in_a_graph = tf.function(pieces.decode, reduce_retracing=True)
    assert in_a_graph(tf.cast(ids_BL, tf.int64)).numpy().tolist() == want


def test_sources_have_the_language_before_and_the_end_behind(pieces):
    lines = [b"the cat", b""]
    (ids, none) = pieces.encode(lines).to_list()
    assert none == []
    assert pieces.encode_source(lines).to_list() == [
        [*ids, special_ids.END],
        [special_ids.END],
    ]
    assert pieces.encode_source(lines, "pt-BR").to_list() == [
        [5, *ids, special_ids.END],
        [5, special_ids.END],
    ]


def test_tensorflow_and_python_agree(pieces):
    lines = text(50, seed=2) + [b"unseen <2de> \xe2\x96\x81", b"", b"a\0b"]
    ids, lengths = pieces.encode_lines(lines)
    ragged = pieces.encode(lines)
    np.testing.assert_array_equal(ids, ragged.flat_values)
    np.testing.assert_array_equal(lengths, ragged.row_lengths())
    assert (ids == special_ids.UNK).any()
    assert ids.dtype == ragged.dtype == np.int32


def test_tf_data_and_a_saved_program_give_the_same(pieces, tmp_path):
    lines = text(9, seed=3)
    dataset = tf.data.Dataset.from_tensor_slices(lines).batch(4)
    found = [ids.to_list() for ids in dataset.map(pieces.encode)]
    assert sum(found, []) == pieces.encode(lines).to_list()

    module = tf.Module()
    module.there_and_back = tf.function(
        lambda strings: pieces.decode(
            pieces.encode_source(strings, "de").to_tensor()
        ),
        input_signature=[tf.TensorSpec((None,), tf.string)],
    )
    tf.saved_model.save(module, str(tmp_path))
    again = tf.saved_model.load(str(tmp_path))
    assert again.there_and_back(lines).numpy().tolist() == lines


def test_a_new_seed_or_another_model_takes_nothing_away(pieces):
    want = pieces.encode([b"the cat"]).to_list()
    other = Wordpieces.learn(text(99, words=["dog", "cat", "the"]), 15)
    other_want = other.encode([b"the cat"]).to_list()
    tf.random.set_seed(3)
    assert pieces.encode([b"the cat"]).to_list() == want
    assert other.encode([b"the cat"]).to_list() == other_want != want
    del other
    gc.collect()
    assert pieces.decode(tf.constant(want)) == b"the cat"


def test_files_come_back(pieces, tmp_path):
    path = str(tmp_path / "wordpieces.model")
    pieces.save(path)
    loaded = Wordpieces.load(path)
    assert loaded.fingerprint == pieces.fingerprint
    assert loaded.pieces == pieces.pieces
    assert loaded.languages == pieces.languages


@pytest.mark.parametrize(
    "content,message",
    [
        (None, "no wordpieces at .*x.model"),
        (b"", "x.model"),
        (b"half a model", "x.model is not a SentencePiece model"),
    ],
)
def test_a_broken_file_is_named(tmp_path, content, message):
    path = tmp_path / "x.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Wordpieces.load(str(path))


def test_a_model_of_other_symbols_is_refused(tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text(99)),
        model_prefix=str(tmp_path / "other"),
        vocab_size=44,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match="must begin with .*'<pad>'"):
        Wordpieces.load(str(tmp_path / "other.model"))


def test_learning_repeats_and_samples_evenly():
    lines = text(300)
    one = Wordpieces.learn(iter(lines), 70)
    assert Wordpieces.learn(lines, 70).model == one.model
    kept = wordpieces_lib._sample((b"%d" % i for i in range(10_000)), 1000)
    assert len(set(kept)) == 1000
    places = np.array(kept, int)
    assert abs(places.mean() - 5000) < 4 * 2887 / 1000**0.5
    assert kept == wordpieces_lib._sample(
        (b"%d" % i for i in range(10_000)), 1000
    )


def test_rare_characters_are_unknown_when_there_are_too_many(caplog):
    common = text(3000, words=["the", "cat", "sat"])
    rare = [chr(0x4E00 + i).encode() for i in range(100)]
    learned = Wordpieces.learn(common + rare, 20)
    assert "106 different characters; the rarest 96" in caplog.text
    assert special_ids.UNK not in learned.encode(["the cat sat"]).flat_values
    assert special_ids.UNK in learned.encode(["\u4e00\u4e09"]).flat_values


@pytest.mark.parametrize(
    "lines,size,message",
    [
        (text(99), 10_000, r"`data.vocabulary_size` must be at most \d+"),
        (text(99), 20, r"`data.vocabulary_size` must be at least \d+.*: 20"),
        (text(99), 4, "`data.vocabulary_size` must be a whole number"),
        ([], 99, "no text"),
        ([b"", b" "], 99, "no text"),
        ([b"a" * 5000], 99, "no text.*1 that are longer"),
    ],
)
def test_a_size_or_text_that_cannot_be_is_explained(lines, size, message):
    with pytest.raises(ValueError, match=message):
        Wordpieces.learn(lines, size)


def test_the_largest_size_that_the_message_names_works():
    with pytest.raises(ValueError) as refusal:
        Wordpieces.learn(text(99), 10_000)
    largest = int(str(refusal.value).split("at most ")[1].split(":")[0])
    assert Wordpieces.learn(text(99), largest).size == largest
    with pytest.raises(ValueError, match=f"at most {largest}"):
        Wordpieces.learn(text(99), largest + 1)


def test_the_smallest_size_that_the_message_names_works():
    with pytest.raises(ValueError) as refusal:
        Wordpieces.learn(text(99), 20)
    least = int(str(refusal.value).split("at least ")[1].split(":")[0])
    assert Wordpieces.learn(text(99), least).size == least


@pytest.mark.parametrize("name", ["sentencepiece", "tensorflow_text"])
def test_a_missing_package_names_the_extra(monkeypatch, pieces, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install moe_tf\[translation\]"):
        Wordpieces.learn(text(99), 70).encode([b"a"])


def test_a_loaded_model_needs_no_sentencepiece(monkeypatch, pieces):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    assert Wordpieces(pieces.model).encode([b"the"]).to_list()


def test_no_name_of_a_file_is_in_the_model(pieces):
    assert b".tsv" not in pieces.model
