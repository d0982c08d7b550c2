import gzip
import logging
import re

import pytest

from moe_tf.data import lines


def read(*paths, max_words=10, report=None):
    sources = [lines.TextFile(str(path), "data.train") for path in paths]
    return list(lines.usable_lines(sources, max_words, report))


def words(rows):
    return [row.split() for row in rows]


def test_plain_and_gzipped_files_read_alike(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one two\nthree\n")
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"four\nfive six"))
    rows = read(tmp_path / "a.txt", tmp_path / "b.gz")
    assert words(rows) == [
        [b"one", b"two"],
        [b"three"],
        [b"four"],
        [b"five", b"six"],
    ]


def test_windows_line_ends_and_byte_order_mark_are_no_words(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone two\r\n\r\nthree\r\n")
    report = lines.LineReport()
    assert words(read(path, report=report)) == [[b"one", b"two"], [b"three"]]
    assert report.skipped[lines.BLANK] == 1


def test_other_than_ascii_whitespace_is_part_of_a_word(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("na\u00a0ïve 中文\u2028x\n", "utf-8")
    assert len(read(path)[0].split()) == 2


def test_what_is_skipped_is_counted_with_its_first_place(tmp_path, caplog):
    path = tmp_path / "a.txt"
    path.write_bytes(
        b"good\n\n \t\ntoo many words here\nbad \xff\xfe\nbad \xc3\nfine\n"
    )
    report = lines.LineReport()
    assert read(path, max_words=3, report=report) == [b"good\n", b"fine\n"]
    assert report.lines == 2
    assert report.skipped == {"blank": 2, "not_utf8": 2, "too_long": 1}
    assert report.first == {
        "blank": f"{path}:2",
        "too_long": f"{path}:4",
        "not_utf8": f"{path}:5",
    }
    with caplog.at_level(logging.WARNING, logger="absl"):
        report.log("train")
    assert f"2 of 7 lines skipped as not_utf8, the first at {path}:5" in (
        caplog.text
    )
    assert "too_long" in caplog.text
    assert "blank" not in caplog.text


def test_a_sentence_of_exactly_max_words_is_kept(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a b c\na b c d\n")
    assert read(path, max_words=3) == [b"a b c\n"]


@pytest.mark.parametrize("extra", [-1, 0, 1, 3 * lines.MAX_LINE_BYTES])
def test_an_endless_line_is_skipped_in_pieces(tmp_path, extra):
    path = tmp_path / "a.txt"
    long = b"x" * (lines.MAX_LINE_BYTES - 1 + extra)
    path.write_bytes(b"before\n" + long + b"\nafter\n" + long)
    report = lines.LineReport()
    rows = read(path, report=report)
    if extra == -1:  # with its line end one byte under the limit
        assert [len(row) for row in rows] == [7, len(long) + 1, 6, len(long)]
    elif extra == 0:  # ends exactly at the limit; the last has no line end
        assert len(rows) == 4
    else:
        assert rows == [b"before\n", b"after\n"]
        assert report.skipped["too_long"] == 2
        assert report.first["too_long"] == f"{path}:2"


def test_reading_is_lazy(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\n")
    sources = lines.text_files(str(tmp_path / "a.txt"), "data.train")
    rows = lines.usable_lines([*sources, None], 10)  # None would raise
    assert next(rows) == b"one\n"


@pytest.mark.parametrize("content", [b"", b"\n\n \n", b"\xff\n", b"a b c d\n"])
def test_a_file_without_a_usable_line_is_refused(tmp_path, content):
    (tmp_path / "good.txt").write_bytes(b"fine\n")
    path = tmp_path / "empty.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"`data.train`.*{path}.*max_words"):
        read(tmp_path / "good.txt", path, max_words=3)


@pytest.mark.parametrize(
    "content",
    [
        b"plain text\n",
        gzip.compress(b"some words\n" * 9999)[:-9],
        gzip.compress(b"some words\n" * 9999)[:20],
        gzip.compress(b"x\n")[:12] + b"\xff" * 40,
        gzip.compress(b"x\n")[:-8] + b"\0" * 8,
    ],
    ids=["plain", "cut", "cut early", "garbage", "checksum"],
)
def test_a_broken_gzip_file_is_refused(tmp_path, content):
    path = tmp_path / "a.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"`data.train` names {path}.*whole"):
        read(path)


def test_patterns_give_sorted_files_in_the_order_named(tmp_path):
    for name in ("b1", "a2", "a1", "[x]"):
        (tmp_path / name).write_bytes(b"x\n")
    patterns = f"{tmp_path}/b1, {tmp_path}/a*,{tmp_path}/[x]"
    files = lines.text_files(patterns, "data.test")
    assert [file.name for file in files] == ["b1", "a1", "a2", "[x]"]
    assert [file.size for file in files] == [2] * 4


@pytest.mark.parametrize(
    "pattern,error,message",
    [
        ("", ValueError, "at least one"),
        (" , ", ValueError, "at least one"),
        ("none.txt", FileNotFoundError, "none.txt.*Correct the path"),
        ("none*", ValueError, r"matches no file: .*none\*"),
        ("a.txt,missing", FileNotFoundError, "missing"),
        ("a.txt,a.*", ValueError, "twice"),
        ("folder", ValueError, "is a folder"),
    ],
)
def test_wrong_patterns_name_the_field(
    tmp_path, monkeypatch, pattern, error, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"x\n")
    (tmp_path / "folder").mkdir()
    with pytest.raises(error, match=message) as caught:
        lines.text_files(pattern, "data.validation")
    assert re.search("`data.validation`", str(caught.value))
