"""Creation of DTensor meshes, and of the virtual devices of a CPU."""

import itertools
import math
import operator
import os
from collections.abc import Sequence

import keras
import tensorflow as tf
from tensorflow.dtensor.python import accelerator_util
from tensorflow.experimental import dtensor

from moe_tf.distribute import all_reduces
from moe_tf.distribute import cluster as clusters

AXES = ("batch", "expert", "model")


def create_mesh(
    axes: dict[str, int],
    device_type: str | None = None,
    devices: Sequence[str] | None = None,
) -> dtensor.Mesh:
    """Creates a mesh with the given axes.

    If this process is one of several (see `cluster`), the processes are
    connected first, and the mesh has the devices of all.

    Args:
        axes: dict from name to size, the slowest axis first. See
            `MeshStrategy`.
        device_type: `"CPU"`, `"GPU"` or `"TPU"`; None for the accelerators of
            this machine, or CPUs where it has none.
        devices: optional list of names such as `"GPU:1"`, one for each place
            of the mesh. Defaults to the first ones.

    Returns:
        `dtensor.Mesh`

    Raises:
        ValueError: an argument is not as above, there are too few devices,
            or processes would not have equally many devices.
        RuntimeError: another strategy is in use, TensorFlow has started
            without the devices, or all-reduces are merged.
    """
    axes = check_axes(axes)
    _refuse_other_strategies()
    all_reduces.configure_environment()
    size = math.prod(axes.values())
    if devices is not None:
        device_type = _check_devices(devices, size, axes)
    elif device_type is None:
        device_type = dtensor.preferred_device_type()
    device_type = device_type.upper()
    if device_type not in ("CPU", "GPU", "TPU"):
        raise ValueError(
            '`device_type` must be "CPU", "GPU", "TPU" or None. '
            f"Received: device_type={device_type}"
        )
    cluster = clusters.joined_cluster() or clusters.resolve_cluster()
    if cluster.num_processes > 1:
        return _across_processes(axes, cluster, device_type, devices)
    if device_type == "CPU":
        _configure_cpus(max(size, _largest_index(devices) + 1), axes)
    else:
        _start_accelerators(device_type, size, axes)
    if devices is None:
        devices = [f"{device_type}:{i}" for i in range(size)]
    return dtensor.create_mesh(list(axes.items()), devices=list(devices))


def _across_processes(axes, cluster, device_type, devices):
    """Creates a mesh of all devices of several processes."""
    if devices is not None:
        raise ValueError(
            "A mesh of several processes takes all of their devices; leave "
            f"`devices` out. Received: devices={devices}"
        )
    per_process = _devices_per_process(axes, cluster)
    if clusters.joined_cluster() is None:
        clusters.start_cluster(cluster, per_process, device_type)
    num_local = dtensor.num_local_devices(device_type)
    if num_local != per_process:
        raise ValueError(
            f"axes={axes} take {per_process} {device_type} devices of each of "
            f"{cluster.num_processes} processes, and a mesh takes all of "
            f"them, but this process has started with {num_local}."
        )
    return dtensor.create_distributed_mesh(
        list(axes.items()), device_type=device_type
    )


def _devices_per_process(axes, cluster):
    num_processes, size = cluster.num_processes, math.prod(axes.values())
    if size % num_processes:
        raise ValueError(
            f"{num_processes} processes must have equally many of the {size} "
            f"devices that axes={axes} take: a multiple of {num_processes} in "
            "all."
        )
    per_process = size // num_processes
    launched = os.environ.get("MOE_TF_DEVICES_PER_PROCESS", str(per_process))
    if launched != str(per_process):
        raise ValueError(
            f"axes={axes} take {per_process} devices of each of "
            f"{num_processes} processes. Change the axes, or "
            "`--devices_per_process` of `moe-tf-launch`. "
            f"Received: MOE_TF_DEVICES_PER_PROCESS={launched}"
        )
    return per_process


def check_axes(axes: dict[str, int]) -> dict[str, int]:
    """Validates mesh axes; returns them as a dict of ints.

    Raises:
        ValueError: `axes` is no dict, or a name or size cannot be used.
    """
    try:
        sizes = {name: operator.index(size) for name, size in axes.items()}
        fits = all(size >= 1 for size in sizes.values())
    except (AttributeError, TypeError):
        fits = False
    if not fits:
        raise ValueError(
            "`axes` must be a dict from names to whole numbers of at least 1, "
            f'such as {{"batch": 4, "expert": 2}}. Received: axes={axes}'
        )
    unknown = [name for name in sizes if name not in AXES]
    if unknown or "batch" not in sizes:
        raise ValueError(
            "`axes` must name `batch`, which carries the examples, and may "
            "name `expert` and `model`, for layouts of variables. "
            f"Received: axes={axes}"
        )
    return sizes


def _refuse_other_strategies():
    other = keras.distribution.distribution()
    if tf.distribute.has_strategy():
        other = tf.distribute.get_strategy()
    if other is not None:
        raise RuntimeError(
            "A mesh works alone: leave the scope of the other strategy, or "
            "call `keras.distribution.set_distribution(None)`, first. "
            f"In use: {type(other).__name__}"
        )


def _check_devices(devices, size, axes):
    kinds = {str(device).upper().split(":")[-2:][0] for device in devices}
    if len(devices) != size or len(set(devices)) != size or len(kinds) != 1:
        raise ValueError(
            f"`devices` must name {size} different devices of one kind for "
            f"axes={axes}. Received: devices={devices}"
        )
    return kinds.pop()


def _largest_index(devices):
    return max((int(str(d).split(":")[-1]) for d in devices or ()), default=0)


def _configure_cpus(count, axes):
    """Splits the CPU into `count` virtual devices or more."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    configured = tf.config.get_logical_device_configuration(cpu)
    if configured is not None and len(configured) >= count:
        return
    try:
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * count
        )
    except RuntimeError as error:  # TensorFlow has started.
        num_started = len(tf.config.list_logical_devices("CPU"))
        if num_started < count:
            raise RuntimeError(
                f"axes={axes} take {count} CPU devices, but TensorFlow has "
                f"started with {num_started}. Make the strategy before "
                "anything else that uses TensorFlow (tensors, models, "
                f"datasets), or take {nearest_axes(axes, num_started)}."
            ) from error


def _start_accelerators(device_type, size, axes):
    num_visible = len(tf.config.get_visible_devices(device_type))
    if num_visible < size:
        nearest = nearest_axes(axes, num_visible) if num_visible else None
        fits = nearest or "device_type='CPU'"
        raise ValueError(
            f"axes={axes} take {size} {device_type} devices, but there are "
            f"{num_visible}; {fits} would fit."
        )
    if accelerator_util.is_initialized():
        return
    clusters.use_nccl(device_type)
    try:
        dtensor.initialize_accelerator_system(device_type)
    except ValueError as error:
        raise RuntimeError(
            "TensorFlow has started already. Make the strategy before "
            "anything else that uses TensorFlow (tensors, models, datasets)."
        ) from error


def nearest_axes(axes: dict[str, int], count: int) -> dict[str, int]:
    """Returns the largest axes within `axes` of at most `count` devices."""
    sizes = itertools.product(
        *(range(1, min(size, count) + 1) for size in axes.values())
    )
    fitting = [size for size in sizes if math.prod(size) <= count]
    best = max(fitting, key=lambda size: (math.prod(size), size))
    return dict(zip(axes, best, strict=True))
