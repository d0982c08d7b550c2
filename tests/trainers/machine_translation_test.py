"""The translation trainer as users run it: prepare, train, die, go on, serve.

A tiny model on a small text is trained, by processes of its own, until it
translates; all else is asked of that run.
"""

import contextlib
import dataclasses
import io
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from moe_tf.layers import clipped_evaluation
from moe_tf.training import loop
from moe_tf.training.translation.modes import MODES
from moe_tf.training.translation.task import TranslationTask
from moe_tf_configs import mt_demo
from tests import small_text
from tests.trainers import runs

STEPS, EVERY = 120, 30
SETTINGS = {
    "train.steps": STEPS,
    "train.evaluate_every": EVERY,
    "train.warmup_steps": 30,
    "train.log_every": 30,
    "train.learning_rate": 1e-2,
    "train.keep_checkpoints": 3,
    "model.width": 32,
    "model.feed_forward": 64,
    "model.dropout": 0.0,
    "data.batch_tokens": 768,
    "data.max_pieces": 32,
    "translate.beam_size": 4,
}
FIGURES = ("test en-de: perplexity", "test en-de: BLEU")


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run: its fields, its folder, and what it printed."""

    fields: dict
    workdir: pathlib.Path
    told: list

    def call(self, mode, stdin=b"", **changes):
        """What a mode prints on standard output and error."""
        config = mt_demo.get_config("tiny")
        config.update_from_flattened_dict({**self.fields, **changes})
        task = TranslationTask(config)
        out, error = io.StringIO(), io.StringIO()
        if isinstance(stdin, str):
            stdin = stdin.encode()
        given = io.TextIOWrapper(io.BytesIO(stdin))
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(error),
        ):
            patch.setattr(sys, "stdin", given)
            MODES[mode](task, config, str(self.workdir))
        return out.getvalue(), error.getvalue()

    def translate(self, texts, **changes):
        """The lines that come out for lines that go in."""
        out, _ = self.call("translate", "\n".join(texts), **changes)
        return out.splitlines()


def trainer_on(folder):
    fields = small_text.write(folder)
    fields = {**{f"data.{key}": x for key, x in fields.items()}, **SETTINGS}
    flags = (f"--config.{name}={value}" for name, value in fields.items())
    module = "moe_tf_trainers.machine_translation"
    return runs.Trainer(module, "mt_demo.py:tiny", tuple(flags)), fields


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trainer, and a run of it that was never killed."""
    trainer, fields = trainer_on(tmp_path_factory.mktemp("text"))
    workdir = tmp_path_factory.mktemp("run")
    return trainer, Run(fields, workdir, trainer.succeed(workdir))


@pytest.fixture
def run(trained):
    return trained[1]


def lines_that(told, start):
    return [line for line in told if line.startswith(start)]


def sources():
    return [row["en"] for row in small_text.sentences()[176:]]


def references():
    return [row["de"] for row in small_text.sentences()[176:]]


def test_learns_to_translate_what_it_has_not_seen(run):
    (scores,) = lines_that(run.told, "test en-de: BLEU")
    assert float(scores.split()[3]) > 60
    assert "version:" in scores  # sacrebleu's signature
    # And it shows in the table that fit leaves behind.
    header, *rows = (run.workdir / "history.csv").read_text().splitlines()
    assert len(rows) == STEPS // EVERY
    bleu = header.split(",").index("val_bleu")
    assert float(rows[-1].split(",")[bleu]) > 60


@pytest.mark.thorough
def test_a_killed_run_ends_with_the_same_bits(trained, tmp_path):
    trainer, finished = trained
    step = 2 * EVERY
    trainer.kill_at(tmp_path, runs.saved(EVERY))
    again = trainer.succeed(tmp_path, f"--config.train.steps={step}")
    assert f"Going on from step {EVERY}." in again
    runs.assert_same(
        runs.state(tmp_path, step), runs.state(finished.workdir, step)
    )


@pytest.mark.thorough
def test_evaluate_repeats_what_training_told(run):
    again = run.call("evaluate")[0].splitlines()
    assert len(lines_that(again, FIGURES)) == 2
    assert lines_that(again, FIGURES) == lines_that(run.told, FIGURES)
    assert len(lines_that(again, "validation en-de: ")) == 2


@pytest.mark.slow
def test_evaluate_tells_what_drops_would_cost(run):
    with pytest.raises(ValueError, match="moe.capacity_factor: null"):
        run.call("evaluate", **{"moe.capacity_factor": 0.5})
    config = mt_demo.get_config("tiny")
    config.update_from_flattened_dict(
        {**run.fields, "moe.capacity_factor": 0.5}
    )
    task = TranslationTask(config)
    prepared = task.prepare(str(run.workdir))
    scorer = task.build(prepared)
    kept = loop.RunCheckpoints(task, config, str(run.workdir), scorer)
    kept.best.restore_latest()
    whole = task.evaluate(scorer, prepared, "test")
    assert len(whole) == 2 and lines_that(run.told, whole[0])
    with clipped_evaluation(scorer):
        (clipped,) = task.evaluate(scorer, prepared, "test", clipped=True)
    perplexity = [float(line.split()[3]) for line in (whole[0], clipped)]
    assert perplexity[1] > perplexity[0]


def test_translates_in_order_and_goes_on_over_bad_lines(run):
    text = "\n".join(sources()[:3]).encode()
    text += b"\n\n\xff\xfe\n" + sources()[3].encode()
    text += b"\n" + b"apple " * 300  # no end of line
    out, reported = run.call("translate", text)
    told = out.split("\n")
    assert told[3:5] == ["", ""] and told[6:] == ["", ""]
    assert all(told[i].endswith(".") for i in (0, 1, 2, 5))
    for number, reason in ((4, "blank"), (5, "not_utf8"), (7, "too_long")):
        assert f"line {number} is not translated: {reason}" in reported
    # Not of the others in the batch, nor of its size.
    alone = run.translate(sources()[3:4], **{"translate.batch_size": 1})
    assert alone == told[5:6]


@pytest.mark.slow
def test_files_are_translated_too(run, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(sources()[:2]))
    out, _ = run.call("translate", **{"translate.input": str(path)})
    assert out.splitlines() == run.translate(sources()[:2])


@pytest.mark.thorough
def test_the_scores_of_translations_are_their_probabilities(run):
    """Step by step with a cache, and all at once as in training."""
    rows = [
        json.loads(line)
        for line in run.translate(
            sources()[:8],
            **{"translate.output": "json", "translate.num_best": 2},
        )
    ]
    found = [
        (source, translation)
        for source, row in zip(sources(), rows, strict=False)
        for translation in row["translations"]
    ]
    assert len(found) >= 8
    text = "".join(f"{s}\t{t['text']}\n" for s, t in found)
    told = run.call("score", text)[0].splitlines()
    compared = 0
    for line, (_, translation) in zip(told[1:], found, strict=True):
        attention = np.array(translation["attention"])
        assert attention.shape == (
            len(translation["pieces"]) + 1,
            len(translation["source_pieces"]),
        )
        np.testing.assert_allclose(attention.sum(axis=1), 1, atol=2e-3)
        log_probability, pieces, _ = map(float, line.split("\t"))
        # Text that is cut into other pieces than were written scores less.
        if pieces == len(translation["pieces"]) + 1:
            want = pytest.approx(translation["log_probability"], abs=2e-3)
            assert log_probability == want
            compared += 1
    assert compared >= 8


@pytest.mark.thorough
def test_methods_and_best_lists(run):
    rows = [
        line.split("\t")
        for line in run.translate(sources()[:2], **{"translate.num_best": 3})
    ]
    for number in ("1", "2"):
        scores = [float(row[1]) for row in rows if row[0] == number]
        assert scores and scores == sorted(scores, reverse=True)
    draw = {"translate.method": "sample", "translate.temperature": 3.0}
    first = run.translate(sources()[:4], **draw)
    # The sentence and the seed decide, not the place.
    assert run.translate(sources()[1:5], **draw)[:3] == first[1:]
    assert (
        run.translate(sources()[:4], **draw, **{"translate.seed": 1}) != first
    )


def test_scores_go_on_over_bad_lines(run):
    text = b"no tab\n" + f"{sources()[0]}\t{references()[0]}\n".encode()
    text += b"\t\n" + b"a\t" + b"b " * 300 + b"\n"
    told = run.call("score", text)[0].splitlines()
    assert told[1] == "skipped: no_tab_between_source_and_target"
    assert len(told[2].split("\t")) == 3
    assert told[3:] == ["skipped: blank", "skipped: too_long"]


@pytest.mark.thorough
def test_the_mean_of_states_translates_as_well(run):
    average = {"translate.checkpoint": "average"}
    with pytest.raises(ValueError, match="no average checkpoint"):
        run.call("evaluate", **average)
    told, _ = run.call("average")
    assert f"steps {STEPS - 2 * EVERY}, {STEPS - EVERY}, {STEPS}" in told
    told = run.call("evaluate", **average)[0].splitlines()
    (scores,) = lines_that(told, "test en-de: BLEU")
    assert float(scores.split()[3]) > 60


_SERVE = """
import sys

class Refused:
    def find_spec(self, name, path=None, target=None):
        assert not name.startswith("moe_tf"), name

sys.meta_path.insert(0, Refused())
import tensorflow as tf
import tensorflow_text

served = tf.saved_model.load(sys.argv[1]).signatures["translate"]
for text in sys.stdin.read().splitlines():
    print(served(tf.constant([text]))["translation"][0, 0].numpy().decode())
assert "moe_tf" not in sys.modules
"""


@pytest.mark.thorough
def test_the_export_answers_alike_without_this_package(run, tmp_path):
    run.call("export")
    served = subprocess.run(
        [sys.executable, "-c", _SERVE, run.workdir / "export"],
        cwd=tmp_path,
        input="\n".join(sources()[:4]).encode(),
        capture_output=True,
        timeout=300,
    )
    assert served.returncode == 0, served.stderr.decode()
    assert served.stdout.decode().splitlines() == run.translate(sources()[:4])


def test_table_9_shows_the_words_of_experts(run):
    told, _ = run.call("experts", **{"experts.experts": "0,3"})
    for expert in (0, 3):
        assert f"encoder_1_moe, expert {expert}: " in told
    shown = [
        line.split("**")[1].strip()
        for line in told.splitlines()
        if "**" in line
    ]
    known = " ".join(sources()) + " ▁ </S>"
    assert shown and all(piece in known for piece in shown)
    page = (run.workdir / "experts.html").read_text()
    assert "<b>" in page and "xpert 3" in page


@pytest.mark.parametrize(
    "field,value,message",
    [
        ("translate.method", "best", "`translate.method` must be one of"),
        ("translate.num_best", 9, "`translate.num_best` must be at most 4"),
        ("translate.pair", "en-fr", "`pair` must be one of"),
        ("translate.input", "none.txt", "`translate.input` names a file"),
        ("translate.checkpoint", "first", "`translate.checkpoint` must be"),
        ("model.cells", 8, "`cells`"),
        ("model.dropout", 0.5, "model.dropout: 0.0 in the workdir, 0.5 now"),
        ("data.vocabulary_size", 130, "data.vocabulary_size"),
        ("experts.layer", "moe", "`experts.layer` must be one of"),
        ("experts.experts", "1,x", "`experts.experts` must be numbers"),
    ],
)
def test_wrong_settings_are_named(run, field, value, message):
    mode = "experts" if field.startswith("experts") else "translate"
    with pytest.raises((ValueError, OSError), match=message):
        run.call(mode, sources()[0], **{field: value})


def test_a_gnmt_is_not_compiled():
    config = mt_demo.get_config("GNMT-MoE-4")
    config.train.jit_compile = True
    with pytest.raises(ValueError, match="`train.jit_compile` is for Transf"):
        TranslationTask(config).check()


@pytest.mark.slow
def test_the_command_line_translates(trained):
    trainer, finished = trained
    result = trainer.run(
        finished.workdir, "--mode=translate", stdin=sources()[0].encode()
    )
    assert result.returncode == 0, result.stderr.decode()
    assert result.stdout.decode().splitlines() == finished.translate(
        sources()[:1]
    )
    assert "1 lines, 0 of them not translated" in result.stderr.decode()


def test_help_names_the_modes(trained, tmp_path):
    told = trained[0].run(tmp_path, "--help").stdout.decode()
    assert "train|evaluate|translate|score|export|average|experts" in told
