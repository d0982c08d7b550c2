"""The trainer as users run it: a process of its own, real text, files."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from tests.trainers import runs

SIX_STEPS = ("--config.train.steps=6", "--config.train.evaluate_every=2")
TRAINER = runs.Trainer("moe_tf_trainers.language_model", "lm_demo.py:tiny")
MANY_STEPS = ("--config.train.steps=600", SIX_STEPS[1])
REPOSITORY = runs.REPOSITORY
command, run = TRAINER.command, TRAINER.run


@pytest.fixture(scope="module")
def finished(tmp_path_factory, seed_corpus):
    """A run that was never killed."""
    workdir = seed_corpus(tmp_path_factory.mktemp("finished"))
    result = run(workdir, *SIX_STEPS)
    assert result.returncode == 0, result.stderr.decode()
    return workdir, result.stdout.decode()


@pytest.mark.thorough
def test_killed_run_ends_with_the_same_bits(finished, tmp_path):
    killed = dataclasses.replace(TRAINER, flags=SIX_STEPS)
    for moment in (runs.saved(2), runs.writes(4)):
        killed.kill_at(tmp_path, moment)
    told = killed.succeed(tmp_path)
    assert any("Going on from step" in line for line in told)
    runs.assert_same(runs.state(tmp_path, 6), runs.state(finished[0], 6))
    # And they are told alike: test perplexity and samples.
    assert told[-5:-1] == finished[1].splitlines()[-5:-1]
    assert told[-5].startswith("test perplexity")


@pytest.mark.slow
def test_damaged_newest_checkpoint_falls_back(finished, tmp_path):
    subprocess.run(["cp", "-r", f"{finished[0]}/.", tmp_path], check=True)
    (data,) = tmp_path.glob("checkpoints/last/step-00000006/variables.data*")
    data.write_bytes(data.read_bytes()[:-10])
    result = run(tmp_path, *SIX_STEPS)
    assert result.returncode == 0
    told = result.stderr.decode()
    assert "Damaged" in told and "step-00000006" in told
    assert "Going on from step 4." in result.stdout.decode()
    runs.assert_same(runs.state(tmp_path, 6), runs.state(finished[0], 6))


def test_another_config_is_refused_with_the_difference(finished):
    result = run(finished[0], *SIX_STEPS, "--config.model.dropout=0.5")
    assert result.returncode == 1
    told = result.stderr.decode()
    assert "model.dropout: 0.1 in the workdir, 0.5 now" in told
    assert "Traceback" not in told


def test_evaluate_and_sample_repeat_what_training_told(finished):
    workdir, told = finished
    for mode, start in (("evaluate", "test perp"), ("sample", "sample:")):
        result = run(workdir, *SIX_STEPS, f"--mode={mode}")
        assert result.returncode == 0, result.stderr.decode()
        lines = result.stdout.decode().splitlines()
        want = [line for line in told.splitlines() if line.startswith(start)]
        assert want
        assert [line for line in lines if line.startswith(start)] == want


def test_score_gives_a_line_for_each_line(finished):
    sentences = (
        b"The people of the United States .\n\xff\xfe\n\nOf the people .\n"
    )
    result = run(finished[0], *SIX_STEPS, "--mode=score", stdin=sentences)
    assert result.returncode == 0, result.stderr.decode()
    header, *rows = result.stdout.decode().splitlines()
    assert header.split("\t")[0] == "log_probability"
    assert len(rows) == 4
    assert rows[1].startswith("skipped: not_utf8")
    assert rows[2].startswith("skipped: blank")
    log_probability, words, _, perplexity = map(float, rows[0].split("\t"))
    assert words == 8
    assert perplexity == pytest.approx(np.exp(-log_probability / 8), rel=1e-3)
    # A thousand known words, hardly trained: near uniform.
    assert 300 < perplexity < 3000


def test_dry_run_writes_nothing(tmp_path):
    result = run(tmp_path / "new", "--mode=dry_run")
    assert result.returncode == 0, result.stderr.decode()
    told = result.stdout.decode()
    # MoE-4 at width 16: two LSTMs of 2 * 4 * 16^2, gates 2 * 16 * 4, experts
    # 4 * 2 * 16 * 32; all experts work, and both gate matrices.
    parameters = 2 * (2 * 4 * 16**2) + 2 * 16 * 4 + 4 * 2 * 16 * 32
    assert f"{parameters:,}" in told
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "override,message",
    [
        ("--config.train.steps=5", "`train.steps` must be a multiple"),
        ("--config.model.variant=MoE-x", "MoE-x"),
    ],
)
def test_bad_fields_are_named_before_anything_is_done(
    tmp_path, override, message
):
    workdir = tmp_path / "run"
    result = run(workdir, "--config.train.evaluate_every=2", override)
    assert result.returncode != 0
    assert message in result.stderr.decode()
    assert "Traceback" not in result.stderr.decode()
    assert not workdir.exists()


def test_a_field_that_does_not_exist_is_named(tmp_path):
    result = run(tmp_path / "run", "--config.train.stepz=5")
    assert result.returncode != 0
    assert 'Did you mean "steps"' in result.stderr.decode()


@pytest.mark.slow
def test_a_run_that_could_not_begin_leaves_the_workdir_free(tmp_path):
    files = ["--config.data.corpus=files"]
    for split in ("train", "validation", "test"):
        text = tmp_path / f"{split}.txt"
        text.write_text("a b c d .\n" * 50)
        files.append(f"--config.data.{split}={text}")
    workdir = tmp_path / "run"
    result = run(workdir, *files, "--config.data.train=none.txt")
    assert result.returncode == 1
    assert "`data.train`" in result.stderr.decode()
    result = run(workdir, *files)
    assert result.returncode == 0, result.stderr.decode()


def test_what_decides_no_weight_may_change(finished):
    result = run(
        finished[0],
        *SIX_STEPS,
        "--mode=sample",
        "--config.sample.temperature=0.0",
        "--config.sample.num_sentences=2",
        "--config.train.log_every=3",
    )
    assert result.returncode == 0, result.stderr.decode()
    first, second = result.stdout.decode().splitlines()
    assert first == second  # the likeliest words


def test_no_checkpoint_is_said(tmp_path):
    result = run(tmp_path, "--mode=evaluate")
    assert result.returncode == 1
    assert "`workdir`" in result.stderr.decode()


@pytest.mark.thorough
def test_full_disk_leaves_the_last_good_checkpoint(finished, tmp_path):
    # A limit on file sizes that the second checkpoint runs into: what it
    # adds to the first is only its own size, so the limit is set in between.
    subprocess.run(["cp", "-r", f"{finished[0]}/.", tmp_path], check=True)
    for folder in tmp_path.glob("checkpoints/last/step-00000006"):
        subprocess.run(["rm", "-r", folder], check=True)
    script = (
        "import resource, signal, sys;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        "import runpy; sys.argv = sys.argv[1:];"
        "runpy.run_module('moe_tf_trainers.language_model',"
        "run_name='__main__')"
    )
    arguments = command(tmp_path, *SIX_STEPS)[2:]
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        timeout=300,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
            ),
        },
    )
    assert result.returncode == 1
    assert "Could not save step 6" in result.stderr.decode()
    assert (tmp_path / "checkpoints/last/step-00000004").exists()
    assert not list(tmp_path.glob("checkpoints/last/*.tmp"))


@pytest.mark.slow
def test_a_terminal_gets_a_bar(tmp_path):
    leader, follower = os.openpty()
    process = subprocess.Popen(
        command(tmp_path), cwd=REPOSITORY, stdout=follower,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(follower)
    told = b""
    with contextlib.suppress(OSError):  # what Linux raises at the end
        while data := os.read(leader, 65_536):
            told += data
    os.close(leader)
    assert process.wait() == 0
    assert b"2/2" in told
    for name in (b"loss: ", b"perplexity: ", b"worst_load: "):
        assert name in told


@pytest.mark.thorough
def test_interrupt_says_how_to_go_on(tmp_path, seed_corpus):
    code, told = TRAINER.signal_at(
        seed_corpus(tmp_path), runs.saved(2), signal.SIGINT, *MANY_STEPS
    )
    assert code == 130
    assert b"same command" in told and b"Traceback" not in told


@pytest.mark.slow  # `lost_process_test.py` changes the mesh, too.
def test_a_run_begins_on_a_mesh_and_goes_on_on_another(tmp_path):
    short = ("--config.train.evaluate_every=1",)
    meshes = (
        ("--config.mesh.batch=4",),
        ("--config.mesh.batch=2", "--config.mesh.expert=2"),
    )
    for steps, mesh in zip((1, 2), meshes, strict=True):
        result = run(tmp_path, *short, *mesh, f"--config.train.steps={steps}")
        told = result.stdout.decode()
        assert result.returncode == 0, result.stderr.decode()
        assert f"step {steps}/{steps}: " in told
        assert "test perplexity" in told
        assert "retracing" not in result.stderr.decode()
    assert "Going on from step 1." in told
    # Without a mesh batches would be others, so that has to be said.
    alone = (*short, "--config.train.steps=2", "--mode=sample")
    result = run(tmp_path, *alone)
    assert "data.rows_multiple: 8 in the workdir" in result.stderr.decode()
    result = run(tmp_path, *alone, "--config.data.rows_multiple=8")
    assert result.returncode == 0, result.stderr.decode()
    samples = [x for x in told.splitlines() if x.startswith("sample: ")]
    assert result.stdout.decode().splitlines() == samples


def test_the_dry_run_of_a_mesh_needs_no_devices(tmp_path):
    result = run(
        tmp_path / "new",
        "--mode=dry_run",
        "--config.model.variant=MoE-512",
        "--config.mesh.expert=512",
    )
    assert result.returncode == 0, result.stderr.decode()
    assert "batch 1, expert 512, 512 devices" in result.stdout.decode()
