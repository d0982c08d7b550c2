"""Functions in processes of their own, with a time limit.

Devices of a mesh are made before TensorFlow starts, and what fails or hangs
in one measurement must not take the others with it.
"""

import dataclasses
import faulthandler
import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

_TAIL = 30  # Lines of a failed job that are shown.


@dataclasses.dataclass(frozen=True)
class Job:
    """A call of a function that yields records.

    Attributes:
        name: str, also of its log.
        function: `"module:function"`; what it yields are dicts that JSON can
            hold.
        arguments: dict that JSON can hold.
        environment: dict of variables beside those of this process.
    """

    name: str
    function: str
    arguments: dict
    environment: dict = dataclasses.field(default_factory=dict)


def run_job(job, folder, seconds, tell=print):
    """Runs a job and tells of each record as it comes.

    Args:
        job: `Job`
        folder: where its log and records go.
        seconds: after which it is ended.
        tell: called with lines of text.

    Returns:
        `(records, error)`: what it yielded, also before it failed, and None
        or why it did.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    log, path = folder / f"{job.name}.log", folder / f"{job.name}.jsonl"
    path.write_text("")
    end = time.time() + seconds
    call = {**dataclasses.asdict(job), "path": str(path), "end": end}
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, json.dumps(call)],
            env={**os.environ, **job.environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            records, error = _follow(process, path, seconds, tell)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if error:
        lines = log.read_text(errors="replace").splitlines()[-_TAIL:]
        tell(f"{job.name} {error}; the end of {log}:")
        tell("\n".join(f"    {line[:400]}" for line in lines))
    return records, error


def _follow(process, path, seconds, tell):
    end = time.monotonic() + seconds
    records = []
    while True:
        code = process.poll()
        lines = path.read_text().splitlines(keepends=True)
        for line in lines[len(records) :]:
            if not line.endswith("\n"):
                break  # It is being written.
            records.append(json.loads(line))
            tell(format_record(records[-1]))
        if code is not None:
            return records, f"ended with code {code}" if code else None
        if time.monotonic() > end:
            return records, f"took more than {seconds:.0f} s"
        time.sleep(0.2)


def format_record(record):
    """A record as a line."""
    return "; ".join(
        f"{name} {format_value(value)}" for name, value in record.items()
    )


def format_value(value):
    """A value of a record as text."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def main(call):
    call = json.loads(call)
    # Where a job hangs is told before it is ended.
    left = call["end"] - 3 - time.time()
    faulthandler.dump_traceback_later(max(1, left))
    module, name = call["function"].split(":")
    function = getattr(importlib.import_module(module), name)
    with open(call["path"], "a") as file:
        for record in function(**call["arguments"]):
            file.write(json.dumps(record) + "\n")
            file.flush()


if __name__ == "__main__":
    main(sys.argv[1])
