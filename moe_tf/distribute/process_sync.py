"""Makes sure that the processes of a mesh do the same, and are all there.

What one does on the mesh needs all. A process that takes another way (its data
end earlier, a callback of it stops the training) would leave the others
waiting for ever, or would pair its values with those of another step.
"""

import collections
import contextlib
import functools
import zlib

import numpy as np
import tensorflow as tf
from tensorflow.experimental import dtensor
from tensorflow.python.eager import context

from moe_tf.distribute import placement

# What processes agree on; `{}` is a number.
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

# What TensorFlow raises where a process is gone, or has aborted a step.
_APART = (
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.UnavailableError,
)
_SECONDS_TO_ANSWER = 3
_LOST_NAMED = 4  # Each may take so many seconds to be found out.


def agree(action, number=0, detail=""):
    """Waits until all processes are here; does nothing where there is one.

    Takes about 2 ms between processes of one machine.

    Args:
        action: one of `ACTIONS`.
        number: int that belongs to it.
        detail: str or bytes; what else must be equal.

    Raises:
        RuntimeError: a process is here with other arguments, or is lost.
    """
    if dtensor.num_clients() == 1:
        return
    crc = zlib.crc32(detail.encode() if isinstance(detail, str) else detail)
    with reporting_lost_processes():
        table = _exchange([ACTIONS.index(action), number, crc])
    if (table == table[0]).all():
        return
    groups = collections.defaultdict(list)
    for process, (index, count, _) in enumerate(table):
        groups[ACTIONS[index].format(count)].append(process)
    received = "; ".join(
        f"{action} in process {', '.join(map(str, processes))}"
        for action, processes in groups.items()
    )
    if len(groups) == 1:
        received += f", but with something else. Here: {detail}"
    raise RuntimeError(
        "The processes of a mesh must do the same, with as many batches, of "
        f"equal shapes. Received: {received}"
    )


@functools.cache
def _exchanger():
    """A function from this process's row of numbers to those of all.

    It runs on CPUs, so that it neither waits for accelerators nor depends on
    the axes, which may differ between the processes.
    """
    size = dtensor.num_global_devices("CPU")
    mesh = dtensor.create_distributed_mesh([("all", size)], device_type="CPU")
    sharded = placement.layout(mesh, ("all", None))
    whole = placement.layout(mesh, (None, None))
    gather = tf.function(lambda rows: dtensor.relayout(rows, whole))
    local = size // dtensor.num_clients()

    def exchange(row):
        with placement.host():
            row = tf.constant([row], tf.int64)
        rows = gather(dtensor.pack([row] * local, sharded))
        return dtensor.unpack(rows)[0].numpy()[::local]

    return exchange


def _exchange(row):
    return _exchanger()(row)


def describe_shapes(batch):
    """The shapes and dtypes of a nest of tensors, as text."""
    return ", ".join(
        f"{tuple(part.shape)} {part.dtype.name}"
        for part in tf.nest.flatten(batch)
        if hasattr(part, "shape")
    )


def checksum(batch):
    """Bytes that differ where the values of a nest of tensors do."""
    parts = [part for part in tf.nest.flatten(batch) if hasattr(part, "shape")]
    sums = [zlib.crc32(np.ascontiguousarray(part)) for part in parts]
    return f"{describe_shapes(batch)}, values with checksums {sums}"


@contextlib.contextmanager
def reporting_lost_processes():
    """Names the processes whose loss is the reason of an error."""
    try:
        yield
    except tf.errors.OpError as error:
        explained = lost_process_error(error)
        if explained is None:
            raise
        raise explained from error


def lost_process_error(error):
    """A `RuntimeError` that says which process is lost, or None.

    Args:
        error: `tf.errors.OpError`
    """
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
    if isinstance(error, _APART):
        return RuntimeError(
            "The processes of the mesh no longer work together, though all "
            "answer: see what the others printed. Start the run again to "
            f"resume from its last checkpoint. The error here: {error.message}"
        )
    return None


def _lost():
    """Texts such as `"1 (host:port)"`, of processes that do not answer."""
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
        if len(lost) == _LOST_NAMED:
            break
    return lost
