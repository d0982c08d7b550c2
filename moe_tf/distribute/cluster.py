"""Which processes train together, and which one is this.

One mesh may span the devices of several processes, of one machine or of many.
Every process runs the same program and finds its place by `resolve_cluster`.
"""

import contextlib
import dataclasses
import os
import signal
import threading

import tensorflow as tf
from tensorflow.dtensor.python import accelerator_util
from tensorflow.experimental import dtensor
from tensorflow.python.distribute.cluster_resolver import (
    slurm_cluster_resolver as slurm,
)
from tensorflow.python.eager import context

from moe_tf import checks

_SLURM_PORT = 8888  # of the first task of a machine, as TensorFlow's resolver
_JOB = "worker"
_started = None


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The processes that train together, and which one is this.

    Attributes:
        addresses: tuple of `"host:port"`, one for each process and the same
            for all; the first process leads. Empty for a process on its own.
        process_id: int, index of this process.

    Raises:
        ValueError: an attribute is not as above, or two addresses are equal.
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
    def num_processes(self):
        return max(1, len(self.addresses))

    @property
    def is_first(self):
        return self.process_id == 0


def _is_address(address):
    if not isinstance(address, str):
        return False
    host, _, port = address.rpartition(":")
    # DTensor takes the addresses as one text, with commas between them.
    if not host or any(sign in host for sign in "/, \t\n"):
        return False
    return port.isascii() and port.isdigit() and 1 <= int(port) <= 65_535


def resolve_cluster(addresses=None, process_id=None):
    """The `Cluster` of this process.

    From the first of these that is there: the arguments; the environment
    variable `TF_CONFIG`, as `tf.distribute` reads it, with the role `worker`
    and at most one `chief`, which comes first; the variables of a SLURM step
    of several tasks (`srun`); else this process is on its own.

    In a SLURM step the tasks of a machine listen on ports 8888, 8889, ...:
    where others may use these, give `addresses`. GPUs are SLURM's to hand out
    (`--gpus-per-task`).

    Args:
        addresses: optional list of `"host:port"`, one for each process.
        process_id: optional int, index of this process in `addresses`.

    Returns:
        `Cluster`

    Raises:
        ValueError: an argument or a variable cannot be used.
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
            'TF_CONFIG must be as {"cluster": {"worker": ["host:port", ...]}, '
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
    # Not `SlurmClusterResolver`: it sorts hosts as text, so that n10 comes
    # before n2 and tasks get the addresses of others, and it asks a GPU's
    # driver how many tasks there are.
    hosts = slurm.expand_hostlist(step["STEP_NODELIST"])
    numbers = slurm.expand_tasks_per_node(step["STEP_TASKS_PER_NODE"])
    addresses = [
        f"{host}:{_SLURM_PORT + task}"
        for host, number in zip(hosts, numbers, strict=True)
        for task in range(number)
    ]
    cluster = Cluster(addresses, int(step["PROCID"]))
    here = os.environ.get("SLURMD_NODENAME")
    there = addresses[cluster.process_id].rpartition(":")[0]
    if here is not None and here != there:
        raise ValueError(
            f"SLURM task {cluster.process_id} must run on {there}: tasks are "
            "counted machine by machine. Use --distribution=block, or give "
            f"`addresses`. Received: SLURMD_NODENAME={here}"
        )
    return cluster


def joined_cluster():
    """The `Cluster` that this process has started in; else None."""
    if not accelerator_util.is_initialized():
        return None
    return Cluster(dtensor.jobs(), dtensor.client_id())


def start_cluster(cluster, devices_per_process, device_type="CPU"):
    """Connects the processes; before anything else uses TensorFlow.

    `MeshStrategy` calls it with what `resolve_cluster` finds; others need not.

    Waits until all have started, up to an hour, and meanwhile no SIGTERM ends
    the process. Afterwards `dtensor.create_distributed_mesh` makes meshes of
    all their devices. Called again with equal arguments it does nothing.

    When a process dies, an op that needs it raises `UnavailableError` in the
    others within a second. One that stops without closing its connections
    (a machine without power, say) is missed after about 10 seconds; then the
    error is that or `DeadlineExceededError`.

    Args:
        cluster: `Cluster`, as all processes have it but for `process_id`.
        devices_per_process: int. As many virtual CPUs are made; of GPUs, as
            many must be visible.
        device_type: `"CPU"` or `"GPU"`.

    Raises:
        ValueError: an argument is not as above.
        RuntimeError: TensorFlow has started, or with other arguments.
        tf.errors.UnknownError: another program listens on the own port.
    """
    global _started
    checks.at_least("devices_per_process", devices_per_process, 1)
    if device_type not in ("CPU", "GPU"):
        raise ValueError(
            '`device_type` must be "CPU" or "GPU". '
            f"Received: device_type={device_type}"
        )
    asked = (cluster, devices_per_process, device_type)
    if _started == asked:
        return
    _refuse_what_has_started()
    _check_gpus(devices_per_process, device_type)
    use_nccl(device_type)
    if cluster.num_processes > 1:
        os.environ.update(
            DTENSOR_CLIENT_ID=str(cluster.process_id),
            DTENSOR_NUM_CLIENTS=str(cluster.num_processes),
            DTENSOR_JOB_NAME=_JOB,
            DTENSOR_JOBS=",".join(cluster.addresses),
        )
    with _sigterm_kept():
        dtensor.initialize_accelerator_system(
            device_type, num_logical_cpu_devices=devices_per_process
        )
    _started = asked


@contextlib.contextmanager
def _sigterm_kept():
    """Undoes that TensorFlow takes SIGTERM, after which nothing ends by it.

    It takes it as the news of a preemption, for a checkpoint handler of
    `tf.distribute` that is not in use here.
    """
    handler = signal.getsignal(signal.SIGTERM)
    yield
    main = threading.current_thread() is threading.main_thread()
    if main and handler is not None:  # None: not set by Python.
        signal.signal(signal.SIGTERM, handler)


def _refuse_what_has_started():
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


def use_nccl(device_type):
    """Lets GPUs talk to each other by NCCL; else all goes through hosts.

    And lets TensorFlow take memory as it needs it: where it has taken all,
    NCCL has none and fails, "unhandled cuda error". It is said by the
    environment, since DTensor splits the CPU, with which TensorFlow forgets
    `set_memory_growth`. What the environment says already stands.
    """
    if device_type == "GPU":
        os.environ.setdefault("DTENSOR_GPU_USE_NCCL_COMMUNICATION", "1")
        os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")


def _check_gpus(number, device_type):
    if device_type != "GPU":
        return
    there = len(tf.config.get_visible_devices("GPU"))
    if there != number:
        raise ValueError(
            "`devices_per_process` must be the number of visible GPUs: set "
            "CUDA_VISIBLE_DEVICES, or `--devices_per_process` of "
            f"`moe-tf-launch`. Received: devices_per_process={number}, and "
            f"{there} are visible"
        )
