"""Trains and uses language models with and without experts.

moe-tf-lm --config=lm_demo --workdir=runs/demo
moe-tf-lm --config=... --workdir=... --mode=evaluate
moe-tf-lm --config=... --workdir=... --mode=score < sentences.txt
"""

from moe_tf.training.language.modes import MODES
from moe_tf.training.language.task import LanguageModelTask

from . import runner


def run() -> None:
    """Entry point of the console script `moe-tf-lm`."""
    runner.run(LanguageModelTask, MODES)


if __name__ == "__main__":
    run()
