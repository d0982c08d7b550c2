import os

import pytest

from moe_tf import files


def test_replaces_the_whole_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write(path, "long " * 100)
    files.write(path, "é\r\n")
    assert path.read_bytes() == b"\xc3\xa9\r\n"
    monkeypatch.chdir(tmp_path)
    files.write("a.json", "here")
    assert path.read_text() == "here"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    files.write(path, "old")
    with pytest.raises(UnicodeEncodeError):
        files.write(path, "new \ud800")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]
    with pytest.raises(FileNotFoundError):
        files.write(tmp_path / "none" / "a.json", "new")
    with pytest.raises(IsADirectoryError):
        files.write(tmp_path, "new")
    assert os.listdir(tmp_path.parent).count(tmp_path.name) == 1
    assert not list(tmp_path.parent.glob("*.tmp"))


def test_the_file_appears_whole_when_the_block_ends(tmp_path):
    path = tmp_path / "file"
    with files.replace(path) as file:
        file.write(b"first")
        assert not path.exists()
    assert path.read_bytes() == b"first"


def test_a_failed_block_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with pytest.raises(RuntimeError), files.replace(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["file"]


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    path = tmp_path / "file"
    previous = os.umask(0o022)
    try:
        files.write(path, "x")
    finally:
        os.umask(previous)
    assert path.stat().st_mode & 0o777 == 0o644
