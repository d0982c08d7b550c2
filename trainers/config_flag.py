"""The flag `--config`: an experiment by name, or a file of one's own.

--config=lm_demo
--config=lm_demo:MoE-32
--config=folder/experiment.py:argument
"""

import os
import pathlib
import sys

from absl import flags
from ml_collections import config_dict
from ml_collections import config_flags

import moe_tf_configs
from moe_tf.training import workdir

_FOLDER = pathlib.Path(moe_tf_configs.__file__).parent


def define_config_flag() -> flags.FlagHolder:
    """Defines `--config` and, once it is parsed, `--config.FIELD`."""
    flag = config_flags.DEFINE_config_file(
        "config",
        lock_config=True,
        help_string="The experiment, with an argument after a colon if it "
        f"takes one: a file.py, or one of {', '.join(known_experiments())}.",
    )
    parsed = flags.FLAGS["config"]
    parsed.parser = _Parser(parsed.parser)
    return flag


def known_experiments() -> list[str]:
    """Returns the names of the experiments that come with this package."""
    modules = {path.stem for path in _FOLDER.glob("*.py")}
    return sorted(modules - {"__init__", "base"})


def resolve_config(value: str) -> str:
    """Returns `value` with the name of an experiment replaced by its file.

    Args:
        value: `FILE` or `NAME`, optionally followed by `:ARGUMENT`. A file
            comes first.

    Raises:
        ValueError: there is neither such a file nor such an experiment.
    """
    name, colon, argument = value.partition(":")
    if os.path.isfile(name):
        return value
    known = known_experiments()
    if name not in known:
        raise ValueError(
            f"`config` must be a file.py or one of {', '.join(known)}. "
            f"Received: config={value}"
        )
    return f"{_FOLDER / name}.py{colon}{argument}"


def _refuse_former_names(arguments):
    for argument in arguments:
        name = argument.lstrip("-").partition("=")[0]
        field = name.removeprefix("config.").removeprefix("noconfig.")
        if name != field and field in workdir.RENAMED_FIELDS:
            present = workdir.RENAMED_FIELDS[field]
            raise ValueError(
                f"`config.{field}` has been renamed: use `config.{present}`. "
                f"Received: {argument}"
            )


class _Parser(flags.ArgumentParser):
    """Parser of `--config`, around that of `ml_collections` for files."""

    def __init__(self, of_files):
        self._of_files = of_files

    def parse(self, value: str) -> config_dict.ConfigDict:
        _refuse_former_names(sys.argv[1:])
        return self._of_files.parse(resolve_config(value))

    def flag_type(self) -> str:
        return self._of_files.flag_type()
