"""What `moe-tf-mt` can do with a run."""

import contextlib
import json
import os
import sys
import time

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

# Seconds between two words of progress, on standard error.
_PROGRESS = 10.0


def translate(task, config, workdir):
    """Translates lines of files or of standard input, in order.

    A line that cannot be translated gives an empty one (in JSON the reason),
    and is reported on standard error.
    """
    _refuse_a_mesh(task, config, "translate")
    prepared, scorer = _open(task, config, workdir)
    settings = config.translate
    pair = task.pair(prepared)
    number, bad, began = 0, 0, time.monotonic()
    told = began
    found = batch_translate.translate_lines(
        task.translator(scorer, prepared),
        _input_lines(settings.input),
        task.language(prepared, pair),
        settings.batch_size,
        settings.max_pieces,
    )
    for number, line in enumerate(found, start=1):
        if line.skipped:
            bad += 1
            _report(f"line {number} is not translated: {line.skipped}")
        print(_format(line, number, settings), flush=number == 1)
        now = time.monotonic()
        if now - told > _PROGRESS:
            told = now
            _report(f"{number:,} lines, {number / (now - began):,.1f} a second")
    sys.stdout.flush()
    _report(
        f"{number:,} lines, {bad:,} of them not translated, "
        f"{time.monotonic() - began:.1f} s"
    )


def score(task, config, workdir):
    """Scores given translations: `source<TAB>target` lines of standard input.

    Prints for each: the natural logarithm of the target's probability given
    the source, its wordpieces with the end counted, and its perplexity,
    separated by tabs, in the order of the input. A line that cannot be scored
    gives the reason instead.
    """
    _refuse_a_mesh(task, config, "score")
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


def export(task, config, workdir):
    """Saves a program that translates strings, in `<workdir>/export`.

    A SavedModel with the signature `translate`; of several target languages
    one each, `translate_<language>`. It answers as `--mode=translate` does,
    and whoever loads it imports `tensorflow_text` alone.
    """
    _refuse_a_mesh(task, config, "export")
    prepared, scorer = _open(task, config, workdir)
    translator = task.translator(scorer, prepared)
    languages = prepared.wordpieces.languages
    signatures = {"translate": translator.serve()} if not languages else {}
    for language in languages:
        signatures[f"translate_{language}"] = translator.serve(language)
    folder = os.path.join(workdir, "export")
    tf.saved_model.save(translator, folder, signatures)
    loop.print_once(task, f"Saved {', '.join(signatures)} in {folder}")


def average(task, config, workdir):
    """Saves the mean of the last states' weights as `checkpoints/average`.

    To be used with `translate.checkpoint=average`. `train.keep_checkpoints`
    says how many states there are.
    """
    with workdirs.claim_workdir(workdir, config, task.free_fields):
        workdirs.check_workdir(workdir, config, task.free_fields)
        prepared = task.prepare(workdir)
        scorer = task.build(prepared)
        saved = loop.RunCheckpoints(task, config, workdir, scorer)
        steps = averaging.average(
            saved.last,
            saved.in_folder("average"),
            variables.named_variables(scorer),
            task.strategy,
        )
        told = ", ".join(map(str, steps))
        loop.print_once(task, f"Saved the mean of the states of steps {told}")


def evaluate(task, config, workdir):
    """Perplexity, BLEU and chrF of `translate.checkpoint`, pair by pair."""
    name = config.translate.checkpoint
    loop.evaluate(task, config, workdir, name)


def experts(task, config, workdir):
    """Prints which words each expert gets, as table 9 of the paper.

    Writes the same as a page, `<workdir>/experts.html`.
    """
    _refuse_a_mesh(task, config, "experts")
    prepared, scorer = _open(task, config, workdir)
    text, page = expert_report.report(task, scorer, prepared)
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


def _refuse_a_mesh(task, config, mode):
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
            _to_json(found) for found in line.translations
        ]
        return json.dumps(content, ensure_ascii=False)
    if settings.num_best == 1:
        return line.translations[0].text if line.translations else ""
    return "\n".join(
        f"{number}\t{found.score:.4f}\t{found.text}"
        for found in line.translations
    )


def _to_json(found):
    content = {
        "text": found.text,
        "score": found.score,
        "log_probability": found.log_probability,
        "source_pieces": found.source_pieces,
        "pieces": found.pieces,
    }
    if found.attention is not None:
        content["attention"] = found.attention.round(4).tolist()
    return content


def _report(text):
    logging.info(text)
    print(text, file=sys.stderr, flush=True)
