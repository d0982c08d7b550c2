"""Modes of `moe-tf-lm`, the values of its flag `--mode`."""

import functools
import sys

import ml_collections
import numpy as np
from absl import logging

from moe_tf.training import loop
from moe_tf.training.language import scoring
from moe_tf.training.language.task import LanguageModelTask


def sample(
    task: LanguageModelTask, config: ml_collections.ConfigDict, workdir: str
) -> None:
    """Prints sentences drawn from the best checkpoint."""
    prepared, scorer = loop.restore_run(task, config, workdir)
    for line in task.example_outputs(scorer, prepared):
        loop.print_once(task, line)


def score(
    task: LanguageModelTask, config: ml_collections.ConfigDict, workdir: str
) -> None:
    """Scores the sentences of standard input, one a line.

    Prints for each: the natural logarithm of its probability, its words with
    the end counted, its unknown words, and its perplexity per word, separated
    by tabs, in the order of the input. A line that cannot be scored gives
    the reason instead.
    """
    if task.strategy is not None and task.strategy.num_processes > 1:
        raise ValueError(
            "`mode`=score reads standard input, which one process has: start "
            "one alone, with another `mesh` if need be."
        )
    prepared, scorer = loop.restore_run(task, config, workdir)
    total, num_words = 0.0, 0
    print("log_probability\twords\tunknown\tperplexity")
    score_batch = functools.partial(task.score, scorer)
    lines = sys.stdin.buffer
    for scored in scoring.score_lines(score_batch, prepared, lines):
        if scored.skipped:
            print(f"skipped: {scored.skipped}")
            continue
        total += scored.log_probability
        num_words += scored.words
        perplexity = np.exp(-scored.log_probability / scored.words)
        print(
            f"{scored.log_probability:.4f}\t{scored.words}\t"
            f"{scored.unknown}\t{perplexity:.2f}"
        )
    if num_words:
        perplexity = np.exp(-total / num_words)
        logging.info("%d words, perplexity %.2f", num_words, perplexity)


MODES = {
    "train": loop.train,
    "evaluate": loop.evaluate,
    "sample": sample,
    "score": score,
    "dry_run": loop.dry_run,
}
