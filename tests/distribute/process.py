"""Runs a function in a process of its own.

Devices of a mesh must be there before TensorFlow starts, and an error inside
a DTensor op spoils all later ones of the process.
"""

import importlib
import os
import pathlib
import pickle
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[2]


class Failed(Exception):
    """The function did not return; the message is what it printed."""


def run(function, *args, env=None, timeout=300):
    """`function(*args)`, called in a fresh process.

    Args:
        function: of a module of this project, at its top level.
        *args: picklable arguments.
        env: dict of further environment variables.
        timeout: float, seconds until the process is ended.

    Returns:
        What it returned; must be picklable.

    Raises:
        Failed: it raised, or the process died.
    """
    # Sibling processes share the machine. Inter-op threads stay as they are:
    # every device of a mesh needs one.
    env = {**os.environ, "TF_NUM_INTRAOP_THREADS": "1", **(env or {})}
    call = (function.__module__, function.__qualname__, args)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "call")
        path.write_bytes(pickle.dumps(call))
        done = subprocess.run(
            [sys.executable, "-m", __name__, str(path)],
            cwd=ROOT,
            env=env,
            timeout=timeout,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            raise Failed(f"exit code {done.returncode}\n{done.stdout}")
        return pickle.loads(path.read_bytes())


def main(path):
    path = pathlib.Path(path)
    module, name, args = pickle.loads(path.read_bytes())
    function = getattr(importlib.import_module(module), name)
    path.write_bytes(pickle.dumps(function(*args)))


if __name__ == "__main__":
    main(sys.argv[1])
