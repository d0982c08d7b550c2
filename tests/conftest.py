"""What all tests share: few threads, repeatable draws, long files first."""

import gc
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import hypothesis
import pytest

# The same examples every run; HYPOTHESIS_PROFILE=default looks for new ones.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE", "repeatable")
)


def pytest_collection(session):
    """Keeps TensorFlow to a thread, in processes that run tests.

    The process that hands tests to workers does not import TensorFlow.
    """
    config = session.config
    if config.getoption("tx", None) and not hasattr(config, "workerinput"):
        return
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)


@pytest.fixture(autouse=True)
def same_draws_every_run():
    import keras

    keras.utils.set_random_seed(1)


@pytest.fixture(scope="session")
def seed_corpus(tmp_path_factory):
    """Gives a run's folder the corpus that the run would write.

    Writing takes seconds, and is done once for all workers.
    """
    from moe_tf.data.text import sotu

    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    sotu.write_sotu(str(base / "corpus"))

    def seed(workdir):
        os.makedirs(workdir, exist_ok=True)
        os.symlink(base / "corpus", os.path.join(workdir, "corpus"))
        return workdir

    return seed


def pytest_collection_finish(session):
    """Collections do not go through all that was imported."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Long files first, so that no worker is left with one at the end.

    What is thorough for two reasons, for its size and for XLA say, is slow.
    """
    for item in items:
        if len(list(item.iter_markers("thorough"))) > 1:
            item.add_marker("slow")
    long = ("tests/trainers/", "tests/training/", "tests/distribute/")
    items.sort(key=lambda item: not item.nodeid.startswith(long))
