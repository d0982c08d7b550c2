"""Runs functions in processes of their own.

Devices of a mesh must be there before TensorFlow starts, and an error inside
a DTensor op spoils all later ones of the process.

The processes are forks of one that has imported TensorFlow, which takes
longer than most of what they do, and has not started it.
"""

import atexit
import contextlib
import gc
import importlib
import multiprocessing
import os
import pathlib
import pickle
import runpy
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "moe_tf",
        "moe_tf.training.language.task",
        "moe_tf.training.translation.task",
    ]
)


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
        self._printed = pathlib.Path(self._folder.name, "printed")
        self._printed.touch()
        self._process = _FORKS.Process(
            target=_call, args=(self._call, self._printed, env)
        )
        self._process.start()

    def printed(self):
        return self._printed.read_text(errors="replace")

    def wait_until_printed(self, text, seconds=120):
        """Returns when the process has printed `text`."""
        end = time.monotonic() + seconds
        while text not in self.printed():
            if not self._process.is_alive() or time.monotonic() > end:
                raise Failed(self.printed())
            time.sleep(0.05)

    def is_alive(self):
        return self._process.is_alive()

    def signal(self, number):
        os.kill(self._process.pid, number)

    def wait(self, seconds=300):
        """The exit code.

        Raises:
            TimeoutError: it has not ended by then.
        """
        self._process.join(seconds)
        if self._process.is_alive():
            raise TimeoutError(f"after {seconds} s\n{self.printed()}")
        return self._process.exitcode

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
        self._process.join()
        self._folder.cleanup()


def run(function, *args, env=None, timeout=300):
    """`function(*args)`, called in a fresh process; see `Process`."""
    process = Process(function, *args, env=env)
    try:
        return process.result(timeout)
    finally:
        process.close()


@contextlib.contextmanager
def started_program(module, arguments, stdin=b""):
    """The `Process` of `python -m module *arguments`, and its streams' files.

    Files of standard input, output and error. It is killed at the end.
    """
    with tempfile.TemporaryDirectory() as folder:
        names = ("stdin", "stdout", "stderr")
        streams = [pathlib.Path(folder, name) for name in names]
        streams[0].write_bytes(stdin)
        started = Process(_program, module, arguments, streams)
        try:
            yield started, streams
        finally:
            started.close()


def run_program(module, *arguments, stdin=b""):
    """`python -m module *arguments`; gives a `subprocess.CompletedProcess`."""
    with started_program(module, arguments, stdin) as (started, streams):
        try:
            code = started.wait()
        except TimeoutError as error:
            raise TimeoutError(streams[2].read_text()) from error
        told = [path.read_bytes() for path in streams[1:]]
    return subprocess.CompletedProcess(arguments, code, *told)


def start_cluster(function, *args, number=2):
    """Connected `Process`es of one machine that call `function(*args)`."""
    # Here, since no program of the tests should have its flags.
    from moe_tf_trainers import launch

    places = launch.environments(launch.free_ports(number), None, {})
    return [Process(function, *args, env=place) for place in places]


def _call(call, printed, env):
    """What a `Process` does."""
    gc.freeze()  # Else each collection goes through all that was imported.
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    for stream in (sys.stdout, sys.stderr):
        with open(printed, "ab") as file:
            os.dup2(file.fileno(), stream.fileno())
    module, name, args = pickle.loads(call.read_bytes())
    function = getattr(importlib.import_module(module), name)
    try:
        call.write_bytes(pickle.dumps(function(*args)))
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves these out.


def _program(module, arguments, streams):
    """`python -m module *arguments` with these files as standard streams."""
    for number, path in enumerate(streams):
        file = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    sys.stdin = open(0, closefd=False)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
