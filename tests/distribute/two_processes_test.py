"""The language model with experts, on real text, in two processes of two.

Each reads the text, and trains on its own rows of every batch.
"""

import functools

import pytest

from moe_tf.benchmarks import mesh_text
from moe_tf.distribute import MeshStrategy
from tests import process
from tests.distribute import language_model_test

BATCH_4 = (("batch", 4),)
SQUARE = (("batch", 2), ("expert", 2))
# Both processes read all rows, and each has half of the experts.
EXPERT_FIRST = (("expert", 2), ("batch", 2))
QUICK = ((*language_model_test.FLAT, "adam_clipped", "float32", 6),)
WITH_ADAM = tuple(
    wanted for wanted in language_model_test.ALL if wanted[2] == "adam"
)
MATRIX = {
    BATCH_4: language_model_test.ALL,
    SQUARE: language_model_test.ALL,
    EXPERT_FIRST: WITH_ADAM,
}


def train(axes, all_wanted, folder):
    """What a process of a mesh finds: a `mesh_text.Run` for each setting."""
    strategy = MeshStrategy(dict(axes))
    assert strategy.num_processes == 2
    return [run(strategy, wanted, folder) for wanted in all_wanted]


def run(strategy, wanted, folder):
    setting = mesh_text.Setting(*wanted)
    batches, size = read(setting.steps, folder)
    return mesh_text.train_model(strategy, setting, batches, size)


@functools.cache
def read(steps, folder):
    prepared = mesh_text.prepare_text(folder)
    return mesh_text.read_batches(prepared, steps), prepared.vocabulary.size


@pytest.fixture(scope="module")
def folder(tmp_path_factory, seed_corpus):
    """Where the text is counted once, for all processes."""
    path = str(seed_corpus(tmp_path_factory.mktemp("text")))
    mesh_text.prepare_text(path)
    return path


@functools.cache
def alone(wanted, folder):
    """On one device of this process, which has no mesh."""
    return run(None, wanted, folder)


def compare(axes, all_wanted, folder):
    """Checks what both processes found; prints how it differs."""
    cluster = process.start_cluster(train, axes, all_wanted, folder)
    try:
        ones = [alone(wanted, folder) for wanted in all_wanted]
        runs = [member.result(1800) for member in cluster]
    finally:
        for member in cluster:
            member.close()
    for number, its_runs in enumerate(runs):
        found = {}
        for wanted, one, got in zip(all_wanted, ones, its_runs, strict=True):
            apart = mesh_text.differences(one, got)
            print(axes, number, wanted, apart)
            assert got.dropped == pytest.approx(one.dropped, abs=1e-6)
            found[axes, wanted] = apart, one.dropped, one.losses
        language_model_test.check(found)


@pytest.mark.slow
def test_equals_one_device(folder):
    compare(BATCH_4, QUICK, folder)


@pytest.mark.slow
@pytest.mark.parametrize("axes", MATRIX, ids=str)
def test_every_optimizer_and_router_equals_one_device(axes, folder):
    compare(axes, MATRIX[axes], folder)
