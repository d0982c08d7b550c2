"""Puts values of this process onto a mesh, and brings them back."""

import numpy as np
import tensorflow as tf
from tensorflow.experimental import dtensor


def layout(mesh, spec):
    """`dtensor.Layout` of a tuple of axis names and None."""
    return dtensor.Layout([axis or dtensor.UNSHARDED for axis in spec], mesh)


def host():
    """A device scope for the CPU of this process."""
    return tf.device(f"/job:{dtensor.full_job_name()}/device:CPU:0")


def put(value, layout):
    """A DTensor of a value that this process holds whole.

    Each device receives its own shard and never the whole value. Processes
    of one mesh must call it with equal values.

    Args:
        value: `tf.Tensor` or array.
        layout: `dtensor.Layout`

    Returns:
        DTensor
    """
    with host():
        value = tf.convert_to_tensor(value)
        places = _local_places(value.shape, layout)
        shards = {place: _cut(value, place) for place in set(places)}
    return dtensor.pack([shards[place] for place in places], layout)


def get(tensor):
    """The values of a DTensor.

    Args:
        tensor: DTensor

    Returns:
        numpy array, put together on the host. No device holds it whole, but
        where there are several processes, all of which must ask for it.
    """
    where = dtensor.fetch_layout(tensor)
    if where.is_fully_replicated():
        return dtensor.unpack(tensor)[0].numpy()
    if dtensor.num_clients() > 1:
        whole = layout(where.mesh, (None,) * tensor.shape.rank)
        return dtensor.unpack(dtensor.relayout(tensor, whole))[0].numpy()
    result = np.empty(tensor.shape, tensor.dtype.as_numpy_dtype)
    places = _local_places(tensor.shape, where)
    shards = dict(zip(places, dtensor.unpack(tensor), strict=True))
    for place, shard in shards.items():
        result[_slices(place)] = shard.numpy()
    return result


def put_batch(value, mesh):
    """A DTensor of this process's part of a batch.

    Args:
        value: `tf.Tensor` whose first dimension counts examples.
        mesh: `dtensor.Mesh` with an axis `batch`.

    Returns:
        DTensor sharded over `batch`; whole on every device if the axis does
        not divide the examples, and for a scalar.
    """
    rows = [place["batch"] for place in mesh.local_device_locations()]
    parts = sorted(set(rows))
    rank = value.shape.rank
    if not rank or value.shape[0] % len(parts):
        if rank and dtensor.num_clients() > 1:
            raise ValueError(
                f"The part of a batch that each process reads must have a "
                f"multiple of {len(parts)} examples, one or more for each of "
                "its devices; use `drop_remainder=True`. "
                f"Received: {value.shape[0]} examples"
            )
        return put(value, layout(mesh, (None,) * rank))
    with host():
        shards = dict(zip(parts, tf.split(value, len(parts)), strict=True))
    return dtensor.pack(
        [shards[row] for row in rows],
        layout(mesh, ("batch",) + (None,) * (rank - 1)),
    )


def _local_places(shape, layout):
    """For each device of this process, `(start, stop)` of each dimension."""
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


def _cut(value, place):
    whole = all(place[d] == (0, n) for d, n in enumerate(value.shape))
    return value if whole else value[_slices(place)]
