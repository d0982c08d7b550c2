"""Modes of `moe-tf-mt`, the values of its flag `--mode`."""

import contextlib
import json
import os
import sys
import time

import ml_collections
import numpy as np
import tensorflow as tf
from absl import logging

from moe_tf import files
from moe_tf.data import lines
from moe_tf.training import averaging
from moe_tf.training import loop
from moe_tf.training import variables
from moe_tf.training import workdir as workdirs
from moe_tf.training.translation import batch_translate
from moe_tf.training.translation import expert_report
from moe_tf.training.translation import scoring
from moe_tf.training.translation.task import TranslationTask

# Seconds between two lines of progress on standard error.
_PROGRESS_SECONDS = 10.0


def translate(
    task: TranslationTask, config: ml_collections.ConfigDict, workdir: str
) -> None:
    """Translates lines of files or of standard input, in order.

    A line that cannot be translated gives an empty line, or in JSON the
    reason, and is reported on standard error.
    """
    _refuse_mesh(task, config, "translate")
    prepared, scorer = _open(task, config, workdir)
    settings = config.translate
    pair = task.pair(prepared)
    number, num_skipped, began = 0, 0, time.monotonic()
    reported = began
    translated = batch_translate.translate_lines(
        task.translator(scorer, prepared),
        _input_lines(settings.input),
        task.language(prepared, pair),
        settings.batch_size,
        settings.max_pieces,
    )
    for number, line in enumerate(translated, start=1):
        if line.skipped:
            num_skipped += 1
            _report(f"line {number} is not translated: {line.skipped}")
        print(_format(line, number, settings), flush=number == 1)
        now = time.monotonic()
        if now - reported > _PROGRESS_SECONDS:
            reported = now
            _report(f"{number:,} lines, {number / (now - began):,.1f} a second")
    sys.stdout.flush()
    _report(
        f"{number:,} lines, {num_skipped:,} of them not translated, "
        f"{time.monotonic() - began:.1f} s"
    )


def score(
    task: TranslationTask, config: ml_collections.ConfigDict, workdir: str
) -> None:
    """Scores given translations: `source<TAB>target` lines of standard input.

    Prints for each: the natural logarithm of the target's probability given
    the source, its wordpieces with the end counted, and its perplexity,
    separated by tabs, in the order of the input. A line that cannot be scored
    gives the reason instead.
    """
    _refuse_mesh(task, config, "score")
    prepared, scorer = _open(task, config, workdir)
    settings = config.translate
    language = task.language(prepared, task.pair(prepared))
    print("log_probability\twordpieces\tperplexity")
    total, pieces = 0.0, 0
    for scored in scoring.score_lines(
        scorer,
        prepared,
        _input_lines(settings.input),
        language,
        settings.batch_size,
        settings.max_pieces,
    ):
        if scored.skipped:
            print(f"skipped: {scored.skipped}")
            continue
        total += scored.log_probability
        pieces += scored.pieces
        perplexity = np.exp(-scored.log_probability / scored.pieces)
        print(
            f"{scored.log_probability:.4f}\t{scored.pieces}\t{perplexity:.3f}"
        )
    if pieces:
        _report(
            f"{pieces:,} wordpieces, perplexity {np.exp(-total / pieces):.3f}"
        )


def export(
    task: TranslationTask, config: ml_collections.ConfigDict, workdir: str
) -> None:
    """Saves a program that translates strings, in `<workdir>/export`.

    The program is a SavedModel with the signature `translate`, or, with
    several target languages, one signature `translate_<language>` each. It
    returns the same translations as `--mode=translate`. Loading it needs
    `tensorflow_text` and nothing of this package.
    """
    _refuse_mesh(task, config, "export")
    prepared, scorer = _open(task, config, workdir)
    translator = task.translator(scorer, prepared)
    languages = prepared.wordpieces.languages
    signatures = {"translate": translator.serve()} if not languages else {}
    for language in languages:
        signatures[f"translate_{language}"] = translator.serve(language)
    folder = os.path.join(workdir, "export")
    tf.saved_model.save(translator, folder, signatures)
    loop.print_once(task, f"Saved {', '.join(signatures)} in {folder}")


def average(
    task: TranslationTask, config: ml_collections.ConfigDict, workdir: str
) -> None:
    """Saves the mean of the last checkpoints as `checkpoints/average`.

    `translate.checkpoint=average` uses it. `train.keep_checkpoints` is the
    number of checkpoints that are averaged.
    """
    with workdirs.claim_workdir(workdir, config, task.free_fields):
        workdirs.check_workdir(workdir, config, task.free_fields)
        prepared = task.prepare(workdir)
        scorer = task.build(prepared)
        saved = loop.RunCheckpoints(task, config, workdir, scorer)
        steps = averaging.average_checkpoints(
            saved.last,
            saved.in_folder("average"),
            variables.named_variables(scorer),
            task.strategy,
        )
        listed = ", ".join(map(str, steps))
        loop.print_once(task, f"Saved the mean of the states of steps {listed}")


def evaluate(
    task: TranslationTask, config: ml_collections.ConfigDict, workdir: str
) -> None:
    """Prints perplexity, BLEU and chrF of `translate.checkpoint` by pair."""
    name = config.translate.checkpoint
    loop.evaluate(task, config, workdir, name)


def experts(
    task: TranslationTask, config: ml_collections.ConfigDict, workdir: str
) -> None:
    """Prints the words that each expert gets, as table 9 of the paper.

    Also writes them as a page, `<workdir>/experts.html`.
    """
    _refuse_mesh(task, config, "experts")
    prepared, scorer = _open(task, config, workdir)
    text, page = expert_report.make_report(task, scorer, prepared)
    print(text)
    path = os.path.join(workdir, "experts.html")
    files.write(path, page)
    loop.print_once(task, f"The same as a page: {path}")


MODES = {
    "train": loop.train,
    "evaluate": evaluate,
    "translate": translate,
    "score": score,
    "export": export,
    "average": average,
    "experts": experts,
    "dry_run": loop.dry_run,
}


def _open(task, config, workdir):
    name = config.translate.checkpoint
    return loop.restore_run(task, config, workdir, name)


def _refuse_mesh(task, config, mode):
    if task.strategy is not None:
        raise ValueError(
            f"`mode`={mode} is for one device, which reads the states of any "
            "mesh: leave `mesh` out, and give "
            f"data.rows_multiple={config.data.rows_multiple}. "
            f"Received: mesh={dict(config.mesh)}"
        )


def _input_lines(patterns):
    """Lines of the files, or of standard input where none is named."""
    if not patterns:
        yield from lines.bounded_lines(sys.stdin.buffer)
        return
    for file in lines.text_files(patterns, "translate.input"):
        with contextlib.closing(file.raw_lines()) as raw_lines:
            yield from raw_lines


def _format(line, number, settings):
    if settings.output == "json":
        content = {"line": number}
        if line.skipped:
            content["skipped"] = line.skipped
        content["translations"] = [
            _to_json(translation) for translation in line.translations
        ]
        return json.dumps(content, ensure_ascii=False)
    if settings.num_best == 1:
        return line.translations[0].text if line.translations else ""
    return "\n".join(
        f"{number}\t{translation.score:.4f}\t{translation.text}"
        for translation in line.translations
    )


def _to_json(translation):
    content = {
        "text": translation.text,
        "score": translation.score,
        "log_probability": translation.log_probability,
        "source_pieces": translation.source_pieces,
        "pieces": translation.pieces,
    }
    if translation.attention is not None:
        content["attention"] = translation.attention.round(4).tolist()
    return content


def _report(text):
    logging.info(text)
    print(text, file=sys.stderr, flush=True)
