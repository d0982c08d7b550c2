"""The blocks of docs/mesh.md run as printed."""

import contextlib
import io
import re

import pytest

from tests import process

PAGE = process.ROOT / "docs/mesh.md"


def run_blocks():
    """What the page's blocks of Python print."""
    names, printed = {}, io.StringIO()
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    with contextlib.redirect_stdout(printed):
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), names)
    return printed.getvalue()


@pytest.mark.thorough
def test_the_page_prints_what_it_shows():
    shown = re.findall(r"```text\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert process.run(run_blocks) == "".join(shown)
