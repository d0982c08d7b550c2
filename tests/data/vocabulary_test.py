import hashlib
import logging

import hypothesis
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies as st

from moe_tf import special_ids
from moe_tf.data.vocabulary import Vocabulary

SPECIALS = ("<pad>", "<UNK>", "<S>", "</S>")


def test_ids_follow_counts_then_bytes():
    lines = ["z b é b".encode(), "z a\na\n é z".encode()]
    built = Vocabulary.build(lines, 99)
    assert built.words == (*SPECIALS, "z", "a", "b", "é")
    assert (special_ids.PAD, special_ids.UNK) == (0, 1)
    assert (special_ids.START, special_ids.END) == (2, 3)


def test_size_counts_the_specials():
    built = Vocabulary.build([b"a a a b b c"], 6)
    assert built.words == (*SPECIALS, "a", "b")
    assert built.size == 6


def test_a_text_of_few_words_gives_a_smaller_one_and_says_so(caplog):
    with caplog.at_level(logging.WARNING, logger="absl"):
        assert Vocabulary.build([b"a b"], 50).size == 6
    assert "only 2 different words" in caplog.text
    assert "`data.vocabulary_size`=50" in caplog.text


@pytest.mark.parametrize("size", [-1, 0, 4])
def test_no_room_for_words_is_refused(size):
    with pytest.raises(ValueError, match="`data.vocabulary_size`.*over 4"):
        Vocabulary.build([b"a"], size)


def test_names_of_specials_in_a_text_are_unknown():
    built = Vocabulary.build([b"<UNK> <UNK> <S> </S> <pad> a"], 99)
    assert built.words == (*SPECIALS, "a")
    ids = built.encode(tf.constant(["<UNK>", "<S>", "</S>", "<pad>", "a", "b"]))
    assert ids.numpy().tolist() == [1, 1, 1, 1, 4, 1]
    assert b"a" in built
    assert b"<UNK>" not in built


def test_encode_keeps_shape_ragged_or_not():
    built = Vocabulary.build(["a b 中".encode()], 99)
    ragged = built.encode(tf.strings.split(["a ? b", "", "中"]))
    assert ragged.to_list() == [[4, 1, 5], [], [6]]
    dense = built.encode(tf.constant([["b"], ["中"]]))
    assert dense.dtype == tf.int32
    assert dense.numpy().tolist() == [[5], [6]]


def test_encode_works_first_inside_tf_data():
    built = Vocabulary.build([b"a b"], 99)
    mapped = tf.data.Dataset.from_tensors(["a", "x"]).map(built.encode)
    assert next(iter(mapped)).numpy().tolist() == [4, 1]
    assert built.encode(tf.constant("b")).numpy() == 5


def test_decode_names_specials_and_refuses_others():
    built = Vocabulary.build([b"a b"], 99)
    assert built.decode(np.array([2, 4, 1, 5, 3, 0])) == [
        *("<S>", "a", "<UNK>", "b", "</S>", "<pad>")
    ]
    assert built.sentence(np.array([2, 4, 1, 5, 3, 4, 0])) == "a <UNK> b"
    for wrong in (-1, 6):
        with pytest.raises(ValueError, match=f"`ids`.*Received: {wrong}"):
            built.decode([4, wrong])


word = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters=" \t\n\r\v\f"),
    min_size=1,
    max_size=5,
).filter(lambda text: text not in SPECIALS)


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(st.lists(word, min_size=1, max_size=20))
def test_encoding_a_line_and_decoding_gives_the_line(tmp_path_factory, words):
    line = " ".join(words)
    built = Vocabulary.build([line.encode()], 99)
    path = tmp_path_factory.mktemp("v") / "vocabulary.txt"
    built.save(path)
    loaded = Vocabulary.load(path)
    assert loaded.words == built.words
    # TensorFlow must cut a line where Python cut it.
    ids = loaded.encode(tf.strings.split(line)).numpy()
    assert loaded.decode(ids) == words
    assert loaded.sentence([2, *ids, 3, 0]) == line


def test_save_and_load_keep_the_fingerprint(tmp_path):
    path = tmp_path / "vocabulary.txt"
    built = Vocabulary.build(["a b é".encode()], 99)
    built.save(path)
    assert path.read_text("utf-8") == "<pad>\n<UNK>\n<S>\n</S>\na\nb\né\n"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert built.fingerprint == digest
    assert Vocabulary.load(path).fingerprint == digest
    assert Vocabulary.build([b"a b c"], 99).fingerprint != digest


HEAD = b"<pad>\n<UNK>\n<S>\n</S>\n"


@pytest.mark.parametrize(
    "content,message",
    [
        (b"<UNK>\n<pad>\n<S>\n</S>\na\n", "line 1: must be <pad>"),
        (b"<pad>\n<UNK>\n<s>\n</S>\na\n", "line 3: must be <S>"),
        (HEAD + b"a\nb\na\n", "line 7: repeats line 5"),
        (HEAD + b"a\n<S>\n", "line 6: repeats line 3"),
        (HEAD + b"a\n\nb\n", "line 6: must be one word"),
        (HEAD + b"a\nb c\n", "line 6: must be one word.*'b c'"),
        (HEAD + b"a\r\n", "line 5: must be one word"),
        (HEAD + b"a\n\xff\n", "line 6: not UTF-8"),
        (HEAD, "at least one word"),
        (b"", "line 1: must be <pad>"),
    ],
)
def test_a_damaged_file_is_refused_by_line(tmp_path, content, message):
    path = tmp_path / "vocabulary.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        Vocabulary.load(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.txt"):
        Vocabulary.load(tmp_path / "none.txt")
