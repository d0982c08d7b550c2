"""Tests of a clone, whether the package is installed or not.

`configs/` and `trainers/` are installed as `moe_tf_configs` and
`moe_tf_trainers`. With `pip install -e .` these names lead to the clone.
Otherwise `installed_names/` has links of these names, which come first in the
paths of this process and of those that it starts.
"""

import importlib.util
import os
import pathlib
import sys

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_LINKS = pathlib.Path(__file__).with_name("installed_names")


def _is_of_the_clone(name):
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        return False
    return pathlib.Path(spec.origin).resolve().is_relative_to(_ROOT)


if not all(_is_of_the_clone(path.name) for path in _LINKS.iterdir()):
    sys.path.insert(0, str(_LINKS))
    paths = [str(_LINKS), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
