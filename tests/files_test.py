import os

import pytest

from moe_tf import files


def test_replaces_the_whole_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_atomically(path, "long " * 100)
    files.write_atomically(path, "é\r\n")
    assert path.read_bytes() == b"\xc3\xa9\r\n"
    monkeypatch.chdir(tmp_path)
    files.write_atomically("a.json", "here")
    assert path.read_text() == "here"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    files.write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        files.write_atomically(path, "new \ud800")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]
    with pytest.raises(FileNotFoundError):
        files.write_atomically(tmp_path / "none" / "a.json", "new")
    with pytest.raises(IsADirectoryError):
        files.write_atomically(tmp_path, "new")
    assert os.listdir(tmp_path.parent).count(tmp_path.name) == 1
    assert not list(tmp_path.parent.glob("*.tmp"))
