"""Jobs: function calls in processes of their own, with a time limit.

The devices of a mesh must be made before TensorFlow starts, and a measurement
that fails or hangs must not affect the others.
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
from collections.abc import Callable

_TAIL = 30  # Lines of a failed job's log that are printed.


@dataclasses.dataclass(frozen=True)
class Job:
    """Call of a function that yields records.

    Attributes:
        name: str, also of its log.
        function: `"module:function"`, which yields JSON-serializable dicts.
        arguments: JSON-serializable dict.
        environment: dict of environment variables to add to this process's.
    """

    name: str
    function: str
    arguments: dict
    environment: dict = dataclasses.field(default_factory=dict)


def run_job(
    job: Job,
    folder: str | os.PathLike,
    seconds: float,
    log_line: Callable[[str], None] = print,
) -> tuple[list[dict], str | None]:
    """Runs a job and logs each record as it arrives.

    Args:
        job: `Job`
        folder: folder of the job's log and records.
        seconds: time limit, after which the job is killed.
        log_line: function that is called with lines of text.

    Returns:
        `(records, error)`: all records that the function yielded, and the
        reason of a failure or None.
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
            records, error = _follow(process, path, seconds, log_line)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if error:
        lines = log.read_text(errors="replace").splitlines()[-_TAIL:]
        log_line(f"{job.name} {error}; the end of {log}:")
        log_line("\n".join(f"    {line[:400]}" for line in lines))
    return records, error


def _follow(process, path, seconds, log_line):
    end = time.monotonic() + seconds
    records = []
    while True:
        code = process.poll()
        lines = path.read_text().splitlines(keepends=True)
        for line in lines[len(records) :]:
            if not line.endswith("\n"):
                break  # The line is still being written.
            records.append(json.loads(line))
            log_line(format_record(records[-1]))
        if code is not None:
            return records, f"ended with code {code}" if code else None
        if time.monotonic() > end:
            return records, f"took more than {seconds:.0f} s"
        time.sleep(0.2)


def format_record(record: dict) -> str:
    """Formats a record as one line."""
    return "; ".join(
        f"{name} {format_value(value)}" for name, value in record.items()
    )


def format_value(value: object) -> str:
    """Formats a value of a record."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def main(call: str) -> None:
    """Runs the call of a job, given as JSON, in this process."""
    call = json.loads(call)
    # Before a job is killed, its log gets the place where it hangs.
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
