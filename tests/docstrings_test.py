"""The public faces: their names, annotations, and examples, which run."""

import ast
import doctest
import importlib
import inspect
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

import moe_tf
from tests import process
from tests import sets

ROOT = pathlib.Path(__file__).parents[1]
SUBFACES = (
    "callbacks",
    "decoding",
    "distribute",
    "evaluation",
    "layers",
    "losses",
    "metrics",
    "models",
    "optimizers",
    "schedules",
)
FACES = ("moe_tf", *(f"moe_tf.{name}" for name in SUBFACES))
# Keras and TensorFlow declare these, and a subclass overrides them.
OVERRIDES = {
    "build",
    "call",
    "compute_mask",
    "compute_output_shape",
    "compute_output_spec",
    "from_config",
    "get_config",
    "get_initial_state",
    "result",
    "set_model",
    "update_state",
    "update_step",
}
# Their examples make virtual devices, which a process can do once.
OWN_PROCESS = {
    "moe_tf.distribute.MeshStrategy",
    "moe_tf.distribute.start_cluster",
}
# Their examples train models, or make virtual devices: seconds.
LONG = {
    *OWN_PROCESS,
    "moe_tf.models.NextWordScorer",
    "moe_tf.models.TranslationScorer",
}
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def public_objects():
    """Each function and class of a face, once, by its shortest address."""
    objects = {}
    for face in FACES[1:]:
        module = importlib.import_module(face)
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if inspect.isclass(value) or inspect.isfunction(value):
                objects[f"{face}.{name}"] = value
    return objects


OBJECTS = public_objects()


@pytest.mark.parametrize("face", FACES)
def test_tab_shows_the_face_alone(face):
    module = importlib.import_module(face)
    assert sorted(dir(module)) == sorted(module.__all__)
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.ismodule(value):
            assert face == "moe_tf" and name in SUBFACES, name
        assert name == "__version__" or not name.startswith("_"), name
    assert module.__doc__


def run_example(address):
    """Runs the examples of a name and its methods; returns the failures."""
    face, name = address.rsplit(".", 1)
    value = getattr(importlib.import_module(face), name)
    names = {"keras": keras, "np": np, "tf": tf, "ops": ops, "moe_tf": moe_tf}
    finder = doctest.DocTestFinder()
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    printed = []
    for test in finder.find(value, address, globs=names):
        runner.run(test, out=printed.append)
    if not runner.tries:
        printed.append("no line begins with >>>")
    return "".join(printed)


@pytest.mark.parametrize(
    "address",
    sets.split(sorted(OBJECTS), [x for x in sorted(OBJECTS) if x not in LONG]),
)
def test_example_runs(address):
    assert "Example:\n" in (OBJECTS[address].__doc__ or "")
    if address in OWN_PROCESS:
        failed = process.run(run_example, address)
    else:
        failed = run_example(address)
    assert not failed, failed


def bare_parts(path):
    """Parameters and returns without annotation in a file, as text."""
    tree = ast.parse(path.read_text())
    for node in tree.body:
        public = not getattr(node, "name", "_").startswith("_")
        if isinstance(node, ast.FunctionDef) and public:
            yield from _bare_parts(node, node.args.args, node.name)
        if isinstance(node, ast.ClassDef) and public:
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and _is_own(method):
                    static = any(
                        getattr(decorator, "id", "") == "staticmethod"
                        for decorator in method.decorator_list
                    )
                    rest = method.args.args[0 if static else 1 :]
                    where = f"{node.name}.{method.name}"
                    yield from _bare_parts(method, rest, where)


def _is_own(method):
    if method.name == "__init__":
        return True
    hook = method.name.startswith(("_", "on_"))
    return not hook and method.name not in OVERRIDES


def _bare_parts(function, arguments, where):
    # Not of `*args` and `**kwargs`, which go to a base class as they are.
    for argument in (*arguments, *function.args.kwonlyargs):
        if argument.annotation is None:
            yield f"line {function.lineno}, {where}: {argument.arg}"
    if function.returns is None and function.name != "__init__":
        yield f"line {function.lineno}, {where}: what it returns"


FILES = sorted(
    str(path.relative_to(ROOT)) for path in ROOT.glob("moe_tf/**/*.py")
)


@pytest.mark.parametrize("file", FILES)
def test_public_functions_are_annotated(file):
    bare = list(bare_parts(ROOT / file))
    assert not bare, "\n".join(bare)


def test_annotations_are_shipped():
    assert (ROOT / "moe_tf/py.typed").exists()


@pytest.mark.thorough
def test_importing_moe_tf_needs_no_extra():
    extras = {
        "jax",
        "sacrebleu",
        "sentencepiece",
        "tensorflow_datasets",
        "tensorflow_text",
    }
    # An entry of None makes `import` raise. Keras catches that for jax.
    blocked = f"import sys; sys.modules.update(dict.fromkeys({extras!r}))"
    command = [sys.executable, "-c", f"{blocked}; import moe_tf"]
    subprocess.run(command, cwd=ROOT, check=True)
