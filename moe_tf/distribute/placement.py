"""Transfers of values between this process and a mesh."""

import contextlib
import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf
from tensorflow.experimental import dtensor

from moe_tf.types import Tensor

_PIECE_BYTES = 64 * 2**20


def layout(mesh: dtensor.Mesh, spec: Sequence[str | None]) -> dtensor.Layout:
    """Returns the layout that a tuple of axis names and None describes."""
    return dtensor.Layout([axis or dtensor.UNSHARDED for axis in spec], mesh)


def host() -> contextlib.AbstractContextManager:
    """Returns a device scope for the CPU of this process."""
    return tf.device(f"/job:{dtensor.full_job_name()}/device:CPU:0")


def relayout(tensor: tf.Tensor, layout: dtensor.Layout) -> tf.Tensor:
    """Changes a DTensor's layout; unlike DTensor's own, for bfloat16 too.

    TensorFlow's NCCL ops refuse bfloat16, so its bits are sent as float16.
    """
    if tensor.dtype != tf.bfloat16:
        return dtensor.relayout(tensor, layout)

    def as_bits(move, tensor, where):
        moved = move(tf.bitcast(tensor, tf.float16), where)
        return tf.bitcast(moved, tf.bfloat16)

    @tf.custom_gradient
    def run(x):
        y = as_bits(dtensor.relayout, x, layout)
        return y, lambda dy: as_bits(dtensor.relayout_like, dy, x)

    return run(tensor)


def put(value: Tensor, layout: dtensor.Layout) -> tf.Tensor:
    """Makes a DTensor of a value that lies on the host.

    Each device receives its own shard and never the whole value. All
    processes of a mesh must call it with equal values.

    Args:
        value: `tf.Tensor` or array.
        layout: `dtensor.Layout`

    Returns:
        DTensor
    """
    with host():
        value = tf.convert_to_tensor(value)
        places = _local_places(value.shape, layout)
        shards = {place: _slice(value, place) for place in set(places)}
    return dtensor.pack([shards[place] for place in places], layout)


def get(tensor: tf.Tensor) -> np.ndarray:
    """Assembles the value of a DTensor on the host.

    All processes of a mesh must call it together. With several processes,
    every device then holds up to 64 MiB of the value beside its own shard, or
    one slice along the longest unsharded dimension if that is larger.

    Args:
        tensor: DTensor

    Returns:
        numpy array
    """
    where = dtensor.fetch_layout(tensor)
    if where.is_fully_replicated():
        return dtensor.unpack(tensor)[0].numpy()
    if dtensor.num_clients() > 1:
        return _get_across_processes(tensor, where)
    result = np.empty(tensor.shape, tensor.dtype.as_numpy_dtype)
    places = _local_places(tensor.shape, where)
    shards = dict(zip(places, dtensor.unpack(tensor), strict=True))
    for place, shard in shards.items():
        result[_slices(place)] = shard.numpy()
    return result


def _get_across_processes(tensor, where):
    """Fetches a DTensor in slices along the longest unsharded dimension."""
    replicated = layout(where.mesh, (None,) * tensor.shape.rank)
    size = math.prod(tensor.shape) * tensor.dtype.size
    unsharded = [
        dimension
        for dimension, axis in enumerate(where.sharding_specs)
        if axis == dtensor.UNSHARDED
    ]
    if size <= _PIECE_BYTES or not unsharded:
        return dtensor.unpack(relayout(tensor, replicated))[0].numpy()
    longest = max(unsharded, key=lambda dimension: tensor.shape[dimension])
    length = max(1, tensor.shape[longest] * _PIECE_BYTES // size)
    pieces = []
    for start in range(0, tensor.shape[longest], length):
        begin = [start if d == longest else 0 for d in range(tensor.shape.rank)]
        extent = list(tensor.shape)
        extent[longest] = min(length, tensor.shape[longest] - start)
        piece = tf.slice(tensor, begin, extent)
        pieces.append(dtensor.unpack(relayout(piece, replicated))[0].numpy())
    return np.concatenate(pieces, axis=longest)


def put_batch(value: tf.Tensor, mesh: dtensor.Mesh, whole: bool) -> tf.Tensor:
    """Makes a DTensor of a batch.

    Args:
        value: `tf.Tensor` whose first dimension counts examples.
        mesh: `dtensor.Mesh` with an axis `batch`.
        whole: bool. If true, `value` is the whole batch, equal in all
            processes. Otherwise it is the part of the batch that the devices
            of this process work on.

    Returns:
        DTensor sharded over `batch`. A scalar is replicated, and so is a
        whole batch whose number of examples the axis does not divide.
    """
    rank = value.shape.rank
    if not rank or whole or dtensor.num_clients() == 1:
        divides = rank and value.shape[0] % mesh.dim_size("batch") == 0
        spec = ("batch" if divides else None,) + (None,) * rank
        return put(value, layout(mesh, spec[:rank]))
    rows = [place["batch"] for place in mesh.local_device_locations()]
    parts = sorted(set(rows))
    if value.shape[0] % len(parts):
        raise ValueError(
            "The part of a batch that a process reads must have a multiple "
            f"of {len(parts)} examples, as many for each of its devices. Use "
            "`drop_remainder=True`, or let all read whole batches "
            "(`MeshStrategy.shard_batches`). "
            f"Received: {value.shape[0]} examples"
        )
    with host():
        shards = dict(zip(parts, tf.split(value, len(parts)), strict=True))
    return dtensor.pack(
        [shards[row] for row in rows],
        layout(mesh, ("batch",) + (None,) * (rank - 1)),
    )


def own_part(
    axes: dict[str, int], num_processes: int, process_id: int
) -> tuple[int, int]:
    """Returns the part of a batch that the devices of a process work on.

    Args:
        axes: dict from axis to size, in the order of the devices.
        num_processes: int; each has equally many devices.
        process_id: int, index of the process.

    Returns:
        `(num_parts, part)`, a count and an index. Processes that differ along
        other axes than `batch` alone have the same part.

    Raises:
        ValueError: the devices of a process do not make up such a part.
    """
    places = np.indices(axes.values())[list(axes).index("batch")]
    rows = [
        sorted(set(row)) for row in places.reshape(num_processes, -1).tolist()
    ]
    length = len(rows[0])
    for row in rows:
        if row[0] % length or row != list(range(row[0], row[0] + length)):
            raise ValueError(
                "Processes must have whole parts of a batch: put the axis "
                "`batch` first, and make its size a multiple or a divisor of "
                f"the number of processes, {num_processes}. "
                f"Received: axes={axes}"
            )
    return axes["batch"] // length, rows[process_id][0] // length


def _local_places(shape, layout):
    """Lists each local device's shard: `(start, stop)` of every dimension."""
    places = []
    for location in layout.mesh.local_device_locations():
        place = []
        for size, axis in zip(shape, layout.sharding_specs, strict=True):
            sharded = axis != dtensor.UNSHARDED
            part = size // layout.mesh.dim_size(axis) if sharded else size
            start = location[axis] * part if sharded else 0
            place.append((start, start + part))
        places.append(tuple(place))
    return places


def _slices(place):
    return tuple(slice(*bounds) for bounds in place)


def _slice(value, place):
    if all(place[d] == (0, n) for d, n in enumerate(value.shape)):
        return value
    sizes = [stop - start for start, stop in place]
    return tf.slice(value, [start for start, _ in place], sizes)
