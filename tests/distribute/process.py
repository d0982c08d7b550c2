"""Runs functions in processes of their own.

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
import time

from trainers import launch

ROOT = pathlib.Path(__file__).parents[2]


class Failed(Exception):
    """The function did not return; the message is what it printed."""


class Process:
    """A fresh process that calls `function(*args)`.

    Args:
        function: of a module of this project, at its top level.
        *args: picklable arguments.
        env: dict of further environment variables.
    """

    def __init__(self, function, *args, env=None):
        # Sibling processes share the machine. Inter-op threads stay as they
        # are: every device of a mesh needs one.
        env = {**os.environ, "TF_NUM_INTRAOP_THREADS": "1", **(env or {})}
        call = (function.__module__, function.__qualname__, args)
        self._folder = tempfile.TemporaryDirectory()
        self._call = pathlib.Path(self._folder.name, "call")
        self._call.write_bytes(pickle.dumps(call))
        self._printed = open(pathlib.Path(self._folder.name, "printed"), "w+b")
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(self._call)],
            cwd=ROOT,
            env=env,
            stdout=self._printed,
            stderr=subprocess.STDOUT,
        )

    def printed(self):
        return pathlib.Path(self._printed.name).read_text(errors="replace")

    def wait_until_printed(self, text, seconds=120):
        """Returns when the process has printed `text`."""
        end = time.monotonic() + seconds
        while text not in self.printed():
            if self._process.poll() is not None or time.monotonic() > end:
                raise Failed(self.printed())
            time.sleep(0.05)

    def signal(self, number):
        self._process.send_signal(number)

    def wait(self, seconds=300):
        """The exit code; `TimeoutExpired` if it has not ended by then."""
        return self._process.wait(seconds)

    def result(self, seconds=300):
        """What the function returned; must be picklable.

        Raises:
            Failed: it raised, or the process died.
        """
        code = self.wait(seconds)
        if code:
            raise Failed(f"exit code {code}\n{self.printed()}")
        return pickle.loads(self._call.read_bytes())

    def close(self):
        self._process.kill()
        self._process.wait()
        self._printed.close()
        self._folder.cleanup()


def run(function, *args, env=None, timeout=300):
    """`function(*args)`, called in a fresh process; see `Process`."""
    process = Process(function, *args, env=env)
    try:
        return process.result(timeout)
    finally:
        process.close()


def start_cluster(function, *args, number=2):
    """Connected `Process`es of one machine that call `function(*args)`."""
    places = launch.environments(launch.free_ports(number), None, {})
    return [Process(function, *args, env=place) for place in places]


def main(path):
    path = pathlib.Path(path)
    module, name, args = pickle.loads(path.read_bytes())
    function = getattr(importlib.import_module(module), name)
    path.write_bytes(pickle.dumps(function(*args)))


if __name__ == "__main__":
    main(sys.argv[1])
