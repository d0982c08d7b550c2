"""What earlier versions wrote is read by this one, and means the same.

`tests/saved` holds files of commit 7f4666c, from before modules moved: Keras
files and what their models gave, workdirs of both trainers after two steps
with what a third step printed, and an export.
"""

import pathlib
import tarfile

import keras
import numpy as np
import pytest
import tensorflow as tf

import moe_tf  # noqa: F401 (registers the classes of the files)
from tests import sets
from tests.trainers import runs

SAVED = pathlib.Path(__file__).parent / "saved"
TEXT = "tests/saved/text"
LANGUAGE_MODEL = runs.Trainer(
    "moe_tf_trainers.language_model",
    "lm_demo.py:tiny",
    (
        "--config.data.corpus=files",
        *(
            f"--config.data.{split}={TEXT}/{split}.en"
            for split in ("train", "validation", "test")
        ),
        "--config.data.vocabulary_size=60",
        "--config.data.max_words=12",
        "--config.train.evaluate_every=1",
        "--config.train.keep_checkpoints=1",
        "--config.moe.importance_weight=0.2",
        "--config.moe.capacity_factor=2.0",
    ),
)
TRANSLATION = runs.Trainer(
    "moe_tf_trainers.machine_translation",
    "mt_demo.py:tiny",
    (
        "--config.data.corpus=files",
        f"--config.data.path={TEXT}",
        "--config.data.train={path}/train.{lang}.gz",
        "--config.data.validation={path}/validation.{lang}",
        "--config.data.test={path}/test.{lang}",
        "--config.data.vocabulary_size=120",
        "--config.train.keep_checkpoints=1",
    ),
)


def unpack(name, folder):
    with tarfile.open(SAVED / f"{name}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / name


@pytest.mark.parametrize(
    "name",
    ["layers", "language_model", "language_model_h", "gnmt", "transformer"],
)
def test_keras_files_give_what_they_gave(name):
    with np.load(SAVED / "outputs.npz") as outputs:
        inputs, ids, want = outputs["inputs"], outputs["ids"], outputs[name]
    model = keras.models.load_model(SAVED / f"{name}.keras")
    if name == "layers":
        got = model(inputs)
    elif name.startswith("language_model"):
        got = model(ids)
    else:
        got = model({"source": ids, "tokens": ids[:, :4]})
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "trainer,name",
    [(LANGUAGE_MODEL, "lm_run"), sets.thorough(TRANSLATION, "mt_run")],
    ids=["language_model", "translation"],
)
def test_runs_go_on_and_print_what_they_printed(trainer, name, tmp_path):
    workdir = unpack(name, tmp_path)
    lines = trainer.succeed(workdir, "--config.train.steps=3")
    want = (SAVED / f"{name}.txt").read_text().splitlines()
    start = want.index("Going on from step 2.")
    assert lines[lines.index("Going on from step 2.") : -1] == want[start:-1]


def test_exports_serve(tmp_path):
    pytest.importorskip("tensorflow_text")
    served = tf.saved_model.load(unpack("mt_export", tmp_path))
    answer = served.signatures["translate"](tf.constant(["the child"]))
    assert answer["translation"].shape == (1, 1)
