"""Flags and `main` of all trainers."""

import logging as python_logging
import sys
from collections.abc import Callable

import keras
from absl import app
from absl import flags
from absl import logging

from moe_tf.training import checkpoints
from moe_tf.training import meshes
from moe_tf.training.task import Task

from . import config_flag
from . import freed_memory

_CONFIG = config_flag.define_config_flag()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; a run that is there resumes."
)

_EXPECTED_ERRORS = (
    ValueError,
    OSError,
    ImportError,
    ArithmeticError,
    checkpoints.DamagedCheckpointError,
)


def run(make_task: Callable[..., Task], modes: dict[str, Callable]) -> None:
    """Runs a trainer as a console script.

    Args:
        make_task: function of a config and an optional `MeshStrategy` to a
            `Task`.
        modes: dict from the names that `--mode` takes to functions of a task,
            its config and the workdir.
    """
    mode = flags.DEFINE_enum("mode", "train", list(modes), "What to do.")
    for name in ("config", "workdir", "mode"):  # what `--help` shows
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])

    def main(argv):
        if len(argv) > 1:
            raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
        config = _CONFIG.value
        logging.info("Config:\n%s", config)
        freed_memory.keep_freed_memory()
        try:
            # Devices are made before TensorFlow starts; a dry run needs none.
            dry = mode.value == "dry_run"
            strategy = None if dry else meshes.make_strategy(config)
            python_logging.getLogger("tensorflow").addFilter(_is_news)
            task = make_task(config, strategy)
            keras.utils.set_random_seed(config.seed)
            keras.config.set_dtype_policy(config.dtype_policy)
            modes[mode.value](task, config, _WORKDIR.value)
        except _EXPECTED_ERRORS as error:
            # Wrong input and full disks get one line. --verbosity=1 adds the
            # traceback.
            logging.log(logging.DEBUG, "Traceback:", exc_info=True)
            raise SystemExit(f"{type(error).__name__}: {error}") from None
        except KeyboardInterrupt:
            print("Interrupted. The same command goes on.", file=sys.stderr)
            raise SystemExit(130) from None

    # Progress is printed. --verbosity=0 shows the log of TensorFlow and Keras.
    flags.FLAGS.verbosity = logging.WARNING
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)


def _is_news(record):
    # On a mesh every length of batches has its own program.
    return "triggered tf.function retracing" not in record.getMessage()
