"""The tutorial runs, in a tiny form."""

import json

import matplotlib
import pytest
import tensorflow as tf

from moe_tf.data.text import sotu
from tests import process

NOTEBOOK = process.ROOT / "docs/tutorial.ipynb"


def cells():
    return json.loads(NOTEBOOK.read_text("utf-8"))["cells"]


def run_tiny():
    """Runs the code cells in order, on three speeches and without graphs."""
    matplotlib.use("Agg")
    tf.config.run_functions_eagerly(True)
    speeches = sotu._documents()
    few = [
        next(s for s in speeches if sotu.split_of(s.name) == split)
        for split in sotu.SPLITS
    ]
    sotu._documents = lambda: few
    names = {}
    for number, cell in enumerate(cells()):
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            exec(compile(source, f"cell {number}", "exec"), names)
    assert names["TINY"]


@pytest.mark.thorough
def test_the_code_runs():
    process.run(run_tiny, env={"MOE_TF_TINY_TUTORIAL": "1"})


def test_a_full_run_is_stored_with_its_pictures():
    code = [cell for cell in cells() if cell["cell_type"] == "code"]
    counts = [cell["execution_count"] for cell in code]
    assert counts == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    pictures = [o for o in outputs if "image/png" in o.get("data", ())]
    assert len(pictures) >= 3
    assert all(output["output_type"] != "error" for output in outputs)
    assert NOTEBOOK.stat().st_size < 400_000
