"""README, the notes and docs/: their programs run, their names exist.

On each page the Python blocks run in order, in one process and as printed.
An HTML comment above a block changes this: `<!-- program -->` runs the block
as a program of its own, `<!-- not run: REASON -->` leaves it out.
`tests/distribute/docs_test.py` runs the blocks of `docs/mesh.md`.
"""

import configparser
import importlib
import re
import shlex

import keras
import pytest

from moe_tf.training.language import modes as language_modes
from moe_tf.training.translation import modes as translation_modes
from moe_tf_trainers import config_flag
from tests import process
from tests import sets

ROOT = process.ROOT
PAGES = ("README.md", "docs/layer.md", "docs/routers.md", "docs/trainers.md")
ALL_PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))
)
MODES = {
    "moe-tf-lm": language_modes.MODES,
    "moe-tf-mt": translation_modes.MODES,
}
EXPERIMENTS = {"moe-tf-lm": "lm_demo", "moe-tf-mt": "mt_demo"}
BLOCK = re.compile(r"(?:<!-- (.*?) -->\n)?```python\n(.*?)```", re.DOTALL)


def read(page):
    return (ROOT / page).read_text("utf-8")


def run_block(block, names):
    keras.utils.disable_interactive_logging()  # a line an epoch, no bars
    exec(compile(block, "block", "exec"), names)


def run_program(block):
    run_block(block, {})


@pytest.mark.parametrize("page", sets.split(PAGES, PAGES[1:]))
def test_blocks_run_as_printed(page):
    names = {}
    for mark, block in BLOCK.findall(read(page)):
        if mark == "program":
            process.run(run_program, block)
        elif not mark.startswith("not run: "):
            assert not mark, f"an unknown mark: {mark}"
            run_block(block, names)


def commands(page):
    """Yields the words of each command of the page's shell blocks."""
    for block in re.findall(r"```sh\n(.*?)```", read(page), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for command in re.split(r"&&|\||(?<=\s)--\s", line):
                yield shlex.split(command)


def config_of(program, value):
    """The config that `--config=value` names."""
    path, _, argument = config_flag.resolve_config(value).partition(":")
    name = path.rsplit("/", 1)[-1].removesuffix(".py")
    module = importlib.import_module(f"moe_tf_configs.{name}")
    return module.get_config(*([argument] if argument else []))


def has_field(config, field):
    for name in field.split("."):
        if name not in config:
            return False
        config = config[name]
    return True


@pytest.mark.parametrize("page", [p for p in ALL_PAGES if "```sh" in read(p)])
def test_commands_exist_with_their_flags(page):
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    scripts = setup["options.entry_points"]["console_scripts"]
    for program, *words in commands(page):
        name = program.rsplit("/", 1)[-1]
        if not name.startswith("moe-tf-"):
            continue
        assert f"\n{name} = " in scripts, name
        if name not in MODES:
            continue
        flags = dict(word[2:].split("=", 1) for word in words)
        config = config_of(name, flags.pop("config"))
        assert flags.pop("mode", "train") in MODES[name]
        assert flags.pop("workdir")
        for flag in flags:
            assert has_field(config, flag.removeprefix("config.")), flag


# Figures are as of commits at which fields had other names.
@pytest.mark.parametrize("page", [p for p in ALL_PAGES if "figures" not in p])
def test_fields_of_configs_exist(page):
    if page == "CHANGELOG.md":  # names former fields
        return
    configs = [config_of(name, value) for name, value in EXPERIMENTS.items()]
    for field in re.findall(r"--config\.([a-z_.]+[a-z_])", read(page)):
        assert any(has_field(config, field) for config in configs), field


@pytest.mark.parametrize("page", ALL_PAGES)
def test_paths_exist(page):
    folders = "moe_tf|moe_tf_configs|tests|docs|configs|trainers|\\.ci"
    named = re.findall(rf"`((?:{folders})/[\w./*-]*)`", read(page))
    for path in named:
        assert any(ROOT.glob(path.rstrip("/"))), path


def anchors(text):
    """The anchors of a page's headings, as GitHub makes them."""
    without_code = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", without_code, re.MULTILINE)
    return {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        for heading in headings
    }


@pytest.mark.parametrize("page", ALL_PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text("utf-8")), link
