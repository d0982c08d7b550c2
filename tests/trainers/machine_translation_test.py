"""The translation trainer as users run it: prepare, train, die, go on, serve.

One run of a tiny model on a small text is trained until it translates, and
all else is asked of it.
"""

import json
import subprocess
import sys

import numpy as np
import pytest

from tests import small_text
from tests.trainers import runs

STEPS, EVERY = 320, 80
SETTINGS = {
    "train.steps": STEPS,
    "train.evaluate_every": EVERY,
    "train.warmup_steps": 60,
    "train.learning_rate": 1e-2,
    "train.keep_checkpoints": 2,
    "model.width": 32,
    "model.feed_forward": 64,
    "model.dropout": 0.0,
    "model.encoder_layers": 2,
    "model.decoder_layers": 2,
    "data.batch_tokens": 768,
    "data.max_pieces": 32,
}


def trainer_on(folder, **fields):
    fields = {
        **{
            f"data.{key}": text
            for key, text in small_text.write(folder).items()
        },
        **SETTINGS,
        **fields,
    }
    return runs.Trainer(
        "trainers.machine_translation",
        "mt_demo.py:tiny",
        tuple(f"--config.{name}={value}" for name, value in fields.items()),
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trainer, a run of it that was never killed, and what it told."""
    trainer = trainer_on(tmp_path_factory.mktemp("text"))
    workdir = tmp_path_factory.mktemp("run")
    return trainer, workdir, trainer.succeed(workdir)


FIGURES = ("test en-de: perplexity", "test en-de: BLEU")


def lines_that(told, start):
    return [line for line in told if line.startswith(start)]


def sources():
    return [row["en"] for row in small_text.sentences()[176:]]


def references():
    return [row["de"] for row in small_text.sentences()[176:]]


def translate(trained, text, *flags):
    trainer, workdir, _ = trained
    if isinstance(text, str):
        text = text.encode()
    return trainer.run(workdir, "--mode=translate", *flags, stdin=text)


def test_learns_to_translate_what_it_has_not_seen(trained):
    _, workdir, told = trained
    (scores,) = lines_that(told, "test en-de: BLEU")
    assert float(scores.split()[3]) > 60
    assert "version:" in scores  # sacrebleu's signature
    # And it shows in the table that fit leaves behind.
    header, *rows = (workdir / "history.csv").read_text().splitlines()
    assert len(rows) == STEPS // EVERY
    bleu = header.split(",").index("val_bleu")
    assert float(rows[-1].split(",")[bleu]) > 60


def test_a_killed_run_ends_with_the_same_bits(trained, tmp_path):
    trainer, finished, told = trained
    for moment in (runs.saved(EVERY), runs.writes(2 * EVERY)):
        trainer.kill_at(tmp_path, moment)
    again = trainer.succeed(tmp_path)
    assert lines_that(again, "Going on from step")
    runs.assert_same(runs.state(tmp_path, STEPS), runs.state(finished, STEPS))
    assert lines_that(again, FIGURES) == lines_that(told, FIGURES)


def test_evaluate_repeats_what_training_told(trained):
    trainer, workdir, told = trained
    again = trainer.succeed(workdir, "--mode=evaluate")
    assert lines_that(again, FIGURES) == lines_that(told, FIGURES)
    assert len(lines_that(again, FIGURES)) == 2
    assert len(lines_that(again, "validation en-de: ")) == 2


def test_translates_in_order_and_goes_on_over_bad_lines(trained):
    text = "\n".join(sources()[:3]).encode()
    text += b"\n\n\xff\xfe\n" + sources()[3].encode()  # no end of line
    text += b"\n" + b"apple " * 300 + b"\n"
    result = translate(trained, text)
    assert result.returncode == 0, result.stderr.decode()
    told = result.stdout.decode().split("\n")
    assert told[3:5] == ["", ""] and told[6:] == ["", ""]
    assert all(told[i].endswith(".") for i in (0, 1, 2, 5))
    reported = result.stderr.decode()
    for number, reason in ((4, "blank"), (5, "not_utf8"), (7, "too_long")):
        assert f"line {number} is not translated: {reason}" in reported
    # Not of the others in the batch, nor of its size, nor of the lines ahead.
    alone = translate(trained, sources()[3], "--config.translate.batch_size=1")
    assert alone.stdout.decode().split("\n")[0] == told[5]


def test_the_scores_of_translations_are_their_probabilities(trained):
    """Step by step with a cache, and all at once as in training."""
    trainer, workdir, _ = trained
    result = translate(
        trained,
        "\n".join(sources()[:8]),
        "--config.translate.output=json",
        "--config.translate.num_best=2",
    )
    rows = [json.loads(line) for line in result.stdout.decode().splitlines()]
    found = [
        (source, translation)
        for source, row in zip(sources(), rows, strict=False)
        for translation in row["translations"]
        # What is cut into other pieces than were written scores otherwise.
        if "⁇" not in translation["text"]
    ]
    assert len(found) >= 8
    text = "".join(f"{s}\t{t['text']}\n" for s, t in found).encode()
    told = trainer.succeed(workdir, "--mode=score", stdin=text)
    for line, (_, translation) in zip(told[1:], found, strict=True):
        log_probability, pieces, _ = map(float, line.split("\t"))
        if pieces != len(translation["pieces"]) + 1:
            continue
        assert log_probability == pytest.approx(
            translation["log_probability"], abs=2e-3
        )
        attention = np.array(translation["attention"])
        assert attention.shape == (
            len(translation["pieces"]) + 1,
            len(translation["source_pieces"]),
        )
        np.testing.assert_allclose(attention.sum(axis=1), 1, atol=2e-3)


def test_methods_and_best_lists(trained):
    text = "\n".join(sources()[:2])
    beam = translate(trained, text, "--config.translate.num_best=3")
    rows = [line.split("\t") for line in beam.stdout.decode().splitlines()]
    for number in ("1", "2"):
        scores = [float(row[1]) for row in rows if row[0] == number]
        assert scores == sorted(scores, reverse=True)
    draw = ("--config.translate.method=sample", "--config.translate.seed=3")
    first = translate(trained, text, *draw)
    again = translate(trained, "\n".join(sources()[1:3]), *draw)
    assert (
        first.stdout.decode().splitlines()[1]
        == again.stdout.decode().splitlines()[0]
    )


def test_scores_go_on_over_bad_lines(trained):
    trainer, workdir, _ = trained
    text = b"no tab\n" + f"{sources()[0]}\t{references()[0]}\n".encode()
    text += b"\t\n" + b"a\t" + b"b " * 300 + b"\n"
    told = trainer.succeed(workdir, "--mode=score", stdin=text)
    assert told[1] == "skipped: no_tab_between_source_and_target"
    assert len(told[2].split("\t")) == 3
    assert told[3:] == ["skipped: blank", "skipped: too_long"]


def test_the_mean_of_states_translates_as_well(trained):
    trainer, workdir, _ = trained
    flag = "--config.translate.checkpoint=average"
    early = trainer.run(workdir, "--mode=evaluate", flag)
    assert early.returncode == 1
    assert "no average checkpoint" in early.stderr.decode()
    (told,) = trainer.succeed(workdir, "--mode=average")
    assert f"steps {STEPS - EVERY}, {STEPS}" in told
    told = trainer.succeed(workdir, "--mode=evaluate", flag)
    (scores,) = lines_that(told, "test en-de: BLEU")
    assert float(scores.split()[3]) > 60


_SERVE = """
import sys

class Refused:
    def find_spec(self, name, path=None, target=None):
        assert name.split(".")[0] not in ("moe_tf", "trainers"), name

sys.meta_path.insert(0, Refused())
import tensorflow as tf
import tensorflow_text

served = tf.saved_model.load(sys.argv[1]).signatures["translate"]
for text in sys.stdin.read().splitlines():
    print(served(tf.constant([text]))["translation"][0, 0].numpy().decode())
assert "moe_tf" not in sys.modules
"""


def test_the_export_answers_alike_without_this_package(trained, tmp_path):
    trainer, workdir, _ = trained
    trainer.succeed(workdir, "--mode=export")
    text = "\n".join(sources()[:4])
    served = subprocess.run(
        [sys.executable, "-c", _SERVE, workdir / "export"],
        cwd=tmp_path,
        input=text.encode(),
        capture_output=True,
        timeout=300,
    )
    assert served.returncode == 0, served.stderr.decode()
    assert served.stdout == translate(trained, text).stdout


@pytest.mark.parametrize(
    "flag,message",
    [
        ("translate.method=best", "`translate.method` must be one of"),
        ("translate.num_best=9", "`translate.num_best` must be at most 4"),
        ("translate.pair=en-fr", "`pair` must be one of"),
        ("translate.input=none.txt", "`translate.input` names a file"),
        ("model.cells=8", "`cells`"),
        ("data.vocabulary_size=130", "data.vocabulary_size"),
    ],
)
def test_wrong_settings_are_told_in_a_line(trained, flag, message):
    result = translate(trained, sources()[0], f"--config.{flag}")
    assert result.returncode == 1
    assert message in result.stderr.decode()
    assert "Traceback" not in result.stderr.decode()


def test_table_9_shows_the_words_of_experts(trained):
    trainer, workdir, _ = trained
    told = trainer.succeed(
        workdir, "--mode=experts", "--config.experts.experts=0,3"
    )
    text = "\n".join(told)
    for expert in (0, 3):
        assert f"encoder_1_moe, expert {expert}: " in text
    words = {
        word for row in small_text.sentences() for word in row["en"].split()
    }
    shown = [line.split("**")[1].strip() for line in told if "**" in line]
    assert shown
    known = " ".join(words) + " </s>"
    assert all(piece.lower() in known for piece in shown)
    page = (workdir / "experts.html").read_text()
    assert "<b>" in page and "expert 3" in page
