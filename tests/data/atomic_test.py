import os

import pytest

from moe_tf.data import atomic


def test_the_file_appears_whole_when_the_block_ends(tmp_path):
    path = tmp_path / "new" / "file"
    with atomic.atomic_write(path) as file:
        file.write(b"first")
        assert not path.exists()
    assert path.read_bytes() == b"first"
    assert os.listdir(path.parent) == ["file"]


def test_a_failure_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with pytest.raises(RuntimeError), atomic.atomic_write(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["file"]


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    path = tmp_path / "file"
    previous = os.umask(0o022)
    try:
        with atomic.atomic_write(path) as file:
            file.write(b"x")
    finally:
        os.umask(previous)
    assert path.stat().st_mode & 0o777 == 0o644
