"""Trains and uses language models with and without experts.

moe-tf-lm --config=configs/lm_demo.py --workdir=runs/demo
moe-tf-lm --config=... --workdir=... --mode=evaluate
moe-tf-lm --config=... --workdir=... --mode=score < sentences.txt
"""

import logging as python_logging
import sys

import keras
from absl import app
from absl import flags
from absl import logging
from ml_collections import config_flags

from moe_tf.training import checkpoints
from moe_tf.training import loop
from moe_tf.training import meshes
from moe_tf.training import tasks

_CONFIG = config_flags.DEFINE_config_file(
    "config", lock_config=True, help_string="The experiment: file.py[:arg]."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; a run that is there resumes."
)
_MODE = flags.DEFINE_enum("mode", "train", list(loop.MODES), "What to do.")

_TOLD_IN_A_LINE = (
    ValueError,
    OSError,
    ImportError,
    ArithmeticError,
    checkpoints.DamagedCheckpointError,
)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
    config = _CONFIG.value
    logging.info("Config:\n%s", config)
    try:
        # Devices are made before TensorFlow starts; a dry run needs none.
        dry = _MODE.value == "dry_run"
        strategy = None if dry else meshes.strategy(config)
        python_logging.getLogger("tensorflow").addFilter(_is_news)
        task = tasks.LanguageModelTask(config, strategy)
        keras.utils.set_random_seed(config.seed)
        keras.config.set_dtype_policy(config.dtype_policy)
        loop.MODES[_MODE.value](task, config, _WORKDIR.value)
    except _TOLD_IN_A_LINE as error:
        # Wrong input and full disks are told in a line; --verbosity=1 adds
        # where it was noticed.
        logging.log(logging.DEBUG, "Traceback:", exc_info=True)
        raise SystemExit(f"{type(error).__name__}: {error}") from None
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on.", file=sys.stderr)
        raise SystemExit(130) from None


def _is_news(record):
    # On a mesh every length of batches has a program of its own.
    return "triggered tf.function retracing" not in record.getMessage()


def run():
    """Entry point of the console script `moe-tf-lm`."""
    # Progress is printed; TensorFlow and Keras tell theirs with --verbosity=0.
    flags.FLAGS.verbosity = logging.WARNING
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)


if __name__ == "__main__":
    run()
