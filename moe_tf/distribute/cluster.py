"""Clusters: processes that train together on one mesh.

A mesh may span the devices of several processes, on one machine or on many.
Every process runs the same program. `resolve_cluster` tells a process its
index and everyone's addresses; `start_cluster` connects the processes.
"""

import contextlib
import dataclasses
import os
import signal
import threading
from collections.abc import Sequence

import tensorflow as tf
from tensorflow.dtensor.python import accelerator_util
from tensorflow.experimental import dtensor
from tensorflow.python.distribute.cluster_resolver import (
    slurm_cluster_resolver as slurm,
)
from tensorflow.python.eager import context

from moe_tf import checks

_SLURM_PORT = 8888  # Of a machine's first task, as in TensorFlow's resolver.
_JOB = "worker"
_started = None


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Addresses of the processes that train together, and this one's index.

    Attributes:
        addresses: tuple of `"host:port"`, one for each process and equal in
            all processes. The first process leads. Empty for a process on its
            own.
        process_id: int, index of this process.

    Raises:
        ValueError: an attribute is not as above, or two addresses are equal.

    Example:

    >>> cluster = moe_tf.distribute.Cluster(("host1:8888", "host2:8888"), 1)
    >>> cluster.num_processes, cluster.is_first
    (2, False)
    """

    addresses: tuple[str, ...] = ()
    process_id: int = 0

    def __post_init__(self):
        if isinstance(self.addresses, str):
            raise ValueError(
                "`addresses` must be a list, one for each process. "
                f"Received: addresses={self.addresses!r}"
            )
        object.__setattr__(self, "addresses", tuple(self.addresses))
        for address in self.addresses:
            if not _is_address(address):
                raise ValueError(
                    '`addresses` must be "host:port" with a port of 1 to '
                    f"65535. Received: {address!r} in "
                    f"addresses={self.addresses}"
                )
        if len(set(self.addresses)) < len(self.addresses):
            raise ValueError(
                "`addresses` must differ: processes of one machine need a "
                f"port each. Received: addresses={self.addresses}"
            )
        checks.at_least("process_id", self.process_id, 0)
        if self.process_id >= self.num_processes:
            raise ValueError(
                "`process_id` must be below the number of processes, "
                f"{self.num_processes}. Received: "
                f"process_id={self.process_id}, addresses={self.addresses}"
            )

    @property
    def num_processes(self) -> int:
        return max(1, len(self.addresses))

    @property
    def is_first(self) -> bool:
        return self.process_id == 0


def _is_address(address):
    if not isinstance(address, str):
        return False
    host, _, port = address.rpartition(":")
    # DTensor takes the addresses as one string, separated by commas.
    if not host or any(char in host for char in "/, \t\n"):
        return False
    return port.isascii() and port.isdigit() and 1 <= int(port) <= 65_535


def resolve_cluster(
    addresses: Sequence[str] | None = None, process_id: int | None = None
) -> Cluster:
    """Returns the `Cluster` of this process.

    Takes the first of these sources that exists:

    1. the arguments;
    2. the environment variable `TF_CONFIG`, as `tf.distribute` reads it, with
       the role `worker` and at most one `chief`, which comes first;
    3. the environment variables of a SLURM step of several tasks (`srun`).

    Without any, the process is on its own.

    In a SLURM step the tasks of a machine listen on ports 8888, 8889, ...
    Give `addresses` where other programs may use these ports. SLURM assigns
    the GPUs (`--gpus-per-task`).

    Args:
        addresses: optional list of `"host:port"`, one for each process.
        process_id: optional int, index of this process in `addresses`.

    Returns:
        `Cluster`

    Raises:
        ValueError: an argument or an environment variable is malformed.

    Example:

    >>> cluster = moe_tf.distribute.resolve_cluster(["a:8888", "b:8888"], 0)
    >>> cluster.is_first
    True
    """
    if (addresses is None) != (process_id is None):
        raise ValueError(
            "`addresses` and `process_id` must be given together. "
            f"Received: addresses={addresses}, process_id={process_id}"
        )
    if addresses is not None:
        return Cluster(addresses, process_id)
    return _from_tf_config() or _from_slurm() or Cluster()


def _from_tf_config():
    text = os.environ.get("TF_CONFIG")
    if not text:
        return None
    try:
        resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
        spec = resolver.cluster_spec()
        roles = {role: spec.job_tasks(role) for role in spec.jobs}
        role, index = resolver.task_type, resolver.task_id
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            "TF_CONFIG must look like "
            '{"cluster": {"worker": ["host:port", ...]}, '
            '"task": {"type": "worker", "index": 0}}. '
            f"Received: TF_CONFIG={text} ({error})"
        ) from error
    if not roles:
        return None
    chiefs, workers = roles.pop("chief", []), roles.pop("worker", [])
    if roles or len(chiefs) > 1:
        raise ValueError(
            "TF_CONFIG must have the role `worker` alone, and at most one "
            "`chief`: all processes train, and there are neither parameter "
            f"servers nor evaluators. Received: TF_CONFIG={text}"
        )
    if role not in ("chief", "worker") or index is None:
        raise ValueError(
            "The task in TF_CONFIG must have the type `worker` or `chief`, "
            f"and an index. Received: TF_CONFIG={text}"
        )
    if not 0 <= index < len(chiefs if role == "chief" else workers):
        raise ValueError(
            f"The cluster in TF_CONFIG must hold the task, {role} {index}. "
            f"Received: TF_CONFIG={text}"
        )
    offset = len(chiefs) if role == "worker" else 0
    return Cluster((*chiefs, *workers), offset + index)


def _from_slurm():
    names = ("PROCID", "STEP_NUM_TASKS", "STEP_NODELIST", "STEP_TASKS_PER_NODE")
    step = {name: os.environ.get(f"SLURM_{name}") for name in names}
    if None in step.values() or step["STEP_NUM_TASKS"] == "1":
        return None
    # Not `SlurmClusterResolver`, which sorts hosts as text: n10 comes before
    # n2, and tasks get the addresses of others. It also asks a GPU's driver
    # for the number of tasks.
    hosts = slurm.expand_hostlist(step["STEP_NODELIST"])
    task_counts = slurm.expand_tasks_per_node(step["STEP_TASKS_PER_NODE"])
    addresses = [
        f"{host}:{_SLURM_PORT + task}"
        for host, num_tasks in zip(hosts, task_counts, strict=True)
        for task in range(num_tasks)
    ]
    cluster = Cluster(addresses, int(step["PROCID"]))
    actual = os.environ.get("SLURMD_NODENAME")
    expected = addresses[cluster.process_id].rpartition(":")[0]
    if actual is not None and actual != expected:
        raise ValueError(
            f"SLURM task {cluster.process_id} must run on {expected}: tasks "
            "are counted machine by machine. Use --distribution=block, or give "
            f"`addresses`. Received: SLURMD_NODENAME={actual}"
        )
    return cluster


def joined_cluster() -> Cluster | None:
    """Returns the `Cluster` that this process has joined, if any."""
    if not accelerator_util.is_initialized():
        return None
    return Cluster(dtensor.jobs(), dtensor.client_id())


def start_cluster(
    cluster: Cluster, devices_per_process: int, device_type: str = "CPU"
) -> None:
    """Connects the processes of a cluster.

    `MeshStrategy` does this by itself for the cluster of `resolve_cluster`.
    Call it first for a cluster of your own, before anything else uses
    TensorFlow.

    Waits until all processes have started, for up to an hour; meanwhile
    SIGTERM does not end the process. Afterwards
    `dtensor.create_distributed_mesh` makes meshes of all devices. A second
    call with equal arguments does nothing.

    When a process dies, an op that needs it raises `UnavailableError` in the
    others within a second. A process that stops without closing its
    connections (on a machine that loses power, for instance) is missed after
    about 10 seconds; the error is then `UnavailableError` or
    `DeadlineExceededError`.

    Args:
        cluster: `Cluster`, equal in all processes but for `process_id`.
        devices_per_process: int. So many virtual CPUs are made, or so many
            GPUs must be visible.
        device_type: `"CPU"` or `"GPU"`.

    Raises:
        ValueError: an argument is not as above.
        RuntimeError: TensorFlow has started already, or the process has
            started a cluster with other arguments.
        tf.errors.UnknownError: another program listens on this process's
            port.

    Example:

    >>> cluster = moe_tf.distribute.Cluster()  # A process on its own.
    >>> moe_tf.distribute.start_cluster(cluster, devices_per_process=2)
    >>> strategy = moe_tf.MeshStrategy({"batch": 2})
    >>> strategy.mesh.size
    2
    """
    global _started
    checks.at_least("devices_per_process", devices_per_process, 1)
    if device_type not in ("CPU", "GPU"):
        raise ValueError(
            '`device_type` must be "CPU" or "GPU". '
            f"Received: device_type={device_type}"
        )
    requested = (cluster, devices_per_process, device_type)
    if _started == requested:
        return
    _check_nothing_has_started()
    _check_gpus(devices_per_process, device_type)
    use_nccl(device_type)
    if cluster.num_processes > 1:
        os.environ.update(
            DTENSOR_CLIENT_ID=str(cluster.process_id),
            DTENSOR_NUM_CLIENTS=str(cluster.num_processes),
            DTENSOR_JOB_NAME=_JOB,
            DTENSOR_JOBS=",".join(cluster.addresses),
        )
    with _keeping_sigterm_handler():
        dtensor.initialize_accelerator_system(
            device_type, num_logical_cpu_devices=devices_per_process
        )
    _started = requested


@contextlib.contextmanager
def _keeping_sigterm_handler():
    """Restores the SIGTERM handler that TensorFlow replaces.

    TensorFlow takes SIGTERM for the notice of a preemption, meant for a
    checkpoint handler of `tf.distribute` that is not used here. With
    TensorFlow's handler SIGTERM would no longer end the process.
    """
    handler = signal.getsignal(signal.SIGTERM)
    yield
    main = threading.current_thread() is threading.main_thread()
    if main and handler is not None:  # None: not set by Python.
        signal.signal(signal.SIGTERM, handler)


def _check_nothing_has_started():
    if _started is not None:
        raise RuntimeError(
            "A process starts once, in one cluster with one number of "
            f"devices. It has started with {_started}."
        )
    if accelerator_util.is_initialized() or context.context()._initialized:
        raise RuntimeError(
            "TensorFlow has started already. Connect the processes before "
            "anything else that uses TensorFlow (tensors, models, datasets)."
        )
    if "DTENSOR_JOBS" in os.environ:
        raise RuntimeError(
            "DTENSOR_JOBS is set from the cluster. Unset it and give "
            "`addresses`, or TF_CONFIG. "
            f"Received: DTENSOR_JOBS={os.environ['DTENSOR_JOBS']}"
        )


def use_nccl(device_type: str) -> None:
    """Sets environment variables that let GPUs communicate through NCCL.

    Without them all communication goes through the hosts. Variables that are
    set already keep their values.

    TensorFlow's memory must grow as needed: NCCL fails with "unhandled cuda
    error" if TensorFlow has reserved all memory. This takes the environment,
    since TensorFlow forgets `set_memory_growth` when DTensor splits the CPU.
    """
    if device_type == "GPU":
        os.environ.setdefault("DTENSOR_GPU_USE_NCCL_COMMUNICATION", "1")
        os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")


def _check_gpus(devices_per_process, device_type):
    if device_type != "GPU":
        return
    num_visible = len(tf.config.get_visible_devices("GPU"))
    if num_visible != devices_per_process:
        raise ValueError(
            "`devices_per_process` must be the number of visible GPUs: set "
            "CUDA_VISIBLE_DEVICES, or `--devices_per_process` of "
            "`moe-tf-launch`. Received: "
            f"devices_per_process={devices_per_process}, and {num_visible} "
            "are visible"
        )
