"""The wheel: its names, its files, and its commands far from the clone."""

import configparser
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = {
    "moe_tf": "moe_tf",
    "moe_tf_configs": "configs",
    "moe_tf_trainers": "trainers",
}
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")


def modules():
    """Paths in the wheel of all modules of the clone."""
    return {
        str(pathlib.Path(name, path.relative_to(ROOT / folder)))
        for name, folder in FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
    }


def run(*command, **kwargs):
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=300, **kwargs
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    # Of a copy: a build leaves files in the folder that it is of.
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in FOLDERS.values():
        shutil.copytree(
            ROOT / folder,
            source / folder,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    folder = tmp_path_factory.mktemp("wheel")
    run(
        *PIP,
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        f"-w{folder}",
        source,
    )
    (path,) = folder.glob("*.whl")
    return path


def test_every_package_is_listed():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = setup["options"]["packages"].split()
    packages = {str(pathlib.Path(path).parent) for path in modules()}
    assert listed == sorted(path.replace("/", ".") for path in packages)


@pytest.mark.thorough
def test_the_wheel_has_all_modules_and_no_other_names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    installed = {name for name in names if ".dist-info/" not in name}
    assert installed == modules() | {"moe_tf/py.typed"}


@pytest.mark.thorough
def test_commands_and_experiments_work_far_from_the_clone(wheel, tmp_path):
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(*PIP, "install", "--no-deps", "--target", target, wheel)
    far = {"cwd": elsewhere, "env": {**os.environ, "PYTHONPATH": str(target)}}
    where = "from moe_tf_configs import mt_multi30k as m; print(m.__file__)"
    path = run(sys.executable, "-c", where, **far).strip()
    assert path == str(target / "moe_tf_configs" / "mt_multi30k.py")
    script = target / "bin" / "moe-tf-lm"
    flags = ("--config=lm_demo", "--workdir=none", "--mode=dry_run")
    assert run(script, *flags, **far).startswith("MoE-32, width 128")
    assert not list(elsewhere.iterdir())
