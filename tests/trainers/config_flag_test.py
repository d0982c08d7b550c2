"""`--config` takes experiments by name, and files."""

import sys

import pytest
from absl import flags

import moe_tf_configs
from moe_tf_trainers import config_flag
from tests import process

FOLDER = moe_tf_configs.__path__[0]
MINE = """
from moe_tf_configs import lm_demo

def get_config(variant="MoE-8"):
    config = lm_demo.get_config("tiny")
    config.model.variant = variant
    return config
"""
CASES = {
    "a name": (["--config=lm_demo"], "MoE-32"),
    "in two words": (["--config", "lm_demo:MoE-4"], "MoE-4"),
    "derived": (["--config=mt_multi30k:Transformer"], "Transformer"),
    "a file": (["--config={mine}"], "MoE-8"),
    "a file's argument": (["--config", "{mine}:MoE-16"], "MoE-16"),
    "a field": (["--config=lm_demo", "--config.moe.k=2"], "MoE-32"),
}
REFUSED = {
    "a name": (["--config=lm_dem"], "one of lm1b_moe, lm_demo, mt_demo"),
    "a file": (["--config=none/lm_demo.py"], "config=none/lm_demo.py"),
    "a former name": (
        ["--config=lm_demo", "--config.model.k=2"],
        "`config.model.k` has been renamed: use `config.moe.k`",
    ),
}


def parse(all_arguments):
    """The variant, or the error, that each list of arguments gives."""
    config_flag.define_config_flag()
    results = []
    for arguments in all_arguments:
        sys.argv = ["trainer", *arguments]
        flags.FLAGS.unparse_flags()
        try:
            flags.FLAGS(sys.argv)
            results.append(flags.FLAGS.config.model.variant)
        except flags.Error as error:
            results.append(str(error))
    return results


@pytest.fixture(scope="module")
def parsed(tmp_path_factory):
    mine = tmp_path_factory.mktemp("mine") / "mine.py"
    mine.write_text(MINE)
    names = [*CASES.items(), *REFUSED.items()]
    arguments = [
        [argument.format(mine=mine) for argument in case[0]]
        for _, case in names
    ]
    results = process.run(parse, arguments)
    return results[: len(CASES)], results[len(CASES) :]


def test_names_and_files_are_found(parsed):
    assert parsed[0] == [variant for _, variant in CASES.values()]


def test_what_is_neither_is_refused_in_a_line(parsed):
    for error, (_, message) in zip(parsed[1], REFUSED.values(), strict=True):
        assert message in error and "\n" not in error


def test_a_file_comes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_flag.resolve_config("lm_demo:a:b") == (
        f"{FOLDER}/lm_demo.py:a:b"
    )
    (tmp_path / "lm_demo").write_text(MINE)
    assert config_flag.resolve_config("lm_demo:a:b") == "lm_demo:a:b"
