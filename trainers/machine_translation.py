"""Trains and uses translation models with and without experts.

moe-tf-mt --config=mt_demo --workdir=runs/mt
moe-tf-mt --config=... --workdir=... --mode=translate < sentences.txt
moe-tf-mt --config=... --workdir=... --mode=export
"""

from moe_tf.training.translation.modes import MODES
from moe_tf.training.translation.task import TranslationTask

from . import runner


def run() -> None:
    """Entry point of the console script `moe-tf-mt`."""
    runner.run(TranslationTask, MODES)


if __name__ == "__main__":
    run()
