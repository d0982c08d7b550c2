"""Checks that all processes of a mesh are alive and do the same.

Every program on a mesh needs all processes. A process that does something
else (its data end earlier, or one of its callbacks stops the training) would
leave the others waiting for ever, or would combine its values with those of
another step.
"""

import collections
import contextlib
import functools
import zlib
from collections.abc import Iterator

import numpy as np
import tensorflow as tf
from tensorflow.experimental import dtensor
from tensorflow.python.eager import context

from moe_tf.distribute import placement
from moe_tf.types import Nest

# Actions that processes agree on; `{}` stands for a count.
ACTIONS = (
    "a mesh",
    "data of {} batches",
    "data of unknown length",
    "batch {}",
    "the end of the data after {} batches",
    "a method for one batch",
    "reading a sharded variable",
    "the end of `fit`",
    "the end of `evaluate`",
    "the end of `predict`",
)

# Errors of TensorFlow when a process is lost or has aborted a step.
_LOSS_ERRORS = (
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.UnavailableError,
)
_SECONDS_TO_ANSWER = 3
_MAX_LOST_NAMED = 4  # Each may take `_SECONDS_TO_ANSWER` to detect.


def agree(action: str, count: int = 0, detail: str | bytes = "") -> None:
    """Waits until all processes have called this with equal arguments.

    Does nothing where there is one process. Takes about 2 ms between
    processes of one machine.

    Args:
        action: one of `ACTIONS`.
        count: int, filled into the action.
        detail: str or bytes; anything else that must be equal.

    Raises:
        RuntimeError: a process called it with other arguments, or is lost.
    """
    if dtensor.num_clients() == 1:
        return
    crc = zlib.crc32(detail.encode() if isinstance(detail, str) else detail)
    with reporting_lost_processes():
        table = _exchange([ACTIONS.index(action), count, crc])
    if (table == table[0]).all():
        return
    by_action = collections.defaultdict(list)
    for process, (index, count, _) in enumerate(table):
        by_action[ACTIONS[index].format(count)].append(process)
    received = "; ".join(
        f"{action} in process {', '.join(map(str, processes))}"
        for action, processes in by_action.items()
    )
    if len(by_action) == 1:
        received += f", but with something else. Here: {detail}"
    raise RuntimeError(
        "The processes of a mesh must do the same, with as many batches, of "
        f"equal shapes. Received: {received}"
    )


@functools.cache
def _exchanger():
    """Makes a function that gathers one row of integers of each process.

    The function runs on CPUs. So it does not wait for accelerators, and does
    not depend on the axes, which may differ between the processes.
    """
    size = dtensor.num_global_devices("CPU")
    mesh = dtensor.create_distributed_mesh([("all", size)], device_type="CPU")
    sharded = placement.layout(mesh, ("all", None))
    replicated = placement.layout(mesh, (None, None))
    gather = tf.function(lambda rows: dtensor.relayout(rows, replicated))
    local = size // dtensor.num_clients()

    def exchange(row):
        with placement.host():
            row = tf.constant([row], tf.int64)
        rows = gather(dtensor.pack([row] * local, sharded))
        return dtensor.unpack(rows)[0].numpy()[::local]

    return exchange


def _exchange(row):
    return _exchanger()(row)


def describe_shapes(batch: Nest) -> str:
    """Returns the shapes and dtypes of a nest of tensors, as text."""
    return ", ".join(
        f"{tuple(part.shape)} {part.dtype.name}"
        for part in tf.nest.flatten(batch)
        if hasattr(part, "shape")
    )


def checksum(batch: Nest) -> str:
    """Returns shapes, dtypes and checksums of a nest of tensors, as text."""
    parts = [part for part in tf.nest.flatten(batch) if hasattr(part, "shape")]
    sums = [zlib.crc32(np.ascontiguousarray(part)) for part in parts]
    return f"{describe_shapes(batch)}, values with checksums {sums}"


@contextlib.contextmanager
def reporting_lost_processes() -> Iterator[None]:
    """Context that turns errors of a lost process into one that names it."""
    try:
        yield
    except tf.errors.OpError as error:
        explained = lost_process_error(error)
        if explained is None:
            raise
        raise explained from error


def lost_process_error(error: tf.errors.OpError) -> RuntimeError | None:
    """Returns an error that names the lost processes; None if none is lost."""
    if dtensor.num_clients() == 1:
        return None
    lost = _lost()
    if lost:
        return RuntimeError(
            f"Lost process {', '.join(lost)} of the mesh of "
            f"{dtensor.num_clients()} processes: it has ended, or does not "
            "answer. Start the run again to resume from its last checkpoint. "
            f"The error here: {error.message}"
        )
    if isinstance(error, _LOSS_ERRORS):
        return RuntimeError(
            "The processes of the mesh no longer work together, though all "
            "answer: see what the others printed. Start the run again to "
            f"resume from its last checkpoint. The error here: {error.message}"
        )
    return None


def _lost():
    """Lists processes that do not answer, each as `"1 (host:port)"`."""
    lost = []
    for index, address in enumerate(dtensor.jobs()):
        if index == dtensor.client_id():
            continue
        try:
            context.context().check_collective_ops_peer_health(
                f"/job:{dtensor.full_job_name(index)}",
                1000 * _SECONDS_TO_ANSWER,
            )
        except tf.errors.OpError:
            lost.append(f"{index} ({address})")
        if len(lost) == _MAX_LOST_NAMED:
            break
    return lost
