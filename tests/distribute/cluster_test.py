"""Finds the processes that train together, and connects real ones."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest
import tensorflow as tf

from moe_tf.distribute import cluster as clusters
from tests import process

ROOT = pathlib.Path(__file__).parents[2]
PAIR = ("a:1", "b:2")


@pytest.fixture(autouse=True)
def nothing_in_the_environment(monkeypatch):
    for name in list(os.environ):
        if name == "TF_CONFIG" or name.startswith(("SLURM", "DTENSOR_")):
            monkeypatch.delenv(name)


def set_tf_config(monkeypatch, jobs, role="worker", index=0):
    task = {"type": role, "index": index}
    text = json.dumps({"cluster": jobs, "task": task})
    monkeypatch.setenv("TF_CONFIG", text)


def set_slurm(monkeypatch, **variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


STEP = {
    "SLURM_PROCID": 3,
    "SLURM_STEP_NUM_TASKS": 5,
    "SLURM_STEP_NODELIST": "n[2,10]",
    "SLURM_STEP_TASKS_PER_NODE": "3,2",
    "SLURMD_NODENAME": "n10",
}


def test_alone_when_nothing_says_otherwise():
    alone = clusters.resolve_cluster()
    assert alone == clusters.Cluster()
    assert (alone.num_processes, alone.process_id) == (1, 0)
    assert alone.is_first


def test_arguments_come_first(monkeypatch):
    set_tf_config(monkeypatch, {"worker": ["c:3"]})
    cluster = clusters.resolve_cluster(["a:1", "[::1]:65535"], 1)
    assert cluster.addresses == ("a:1", "[::1]:65535")
    assert (cluster.num_processes, cluster.process_id) == (2, 1)
    assert not cluster.is_first


@pytest.mark.parametrize(
    "jobs,role,index,addresses,process_id",
    [
        ({"worker": PAIR}, "worker", 1, PAIR, 1),
        ({"worker": {"1": "b:2", "0": "a:1"}}, "worker", 1, PAIR, 1),
        ({"worker": ["a:1"]}, "worker", 0, ("a:1",), 0),
        ({"worker": ["b:2"], "chief": ["a:1"]}, "chief", 0, PAIR, 0),
        ({"worker": ["b:2"], "chief": ["a:1"]}, "worker", 0, PAIR, 1),
    ],
)
def test_tf_config(jobs, role, index, addresses, process_id, monkeypatch):
    set_tf_config(monkeypatch, jobs, role, index)
    set_slurm(monkeypatch, **STEP)
    assert clusters.resolve_cluster() == clusters.Cluster(addresses, process_id)


@pytest.mark.parametrize("text", ["", "{}", '{"task": {"type": "worker"}}'])
def test_tf_config_without_a_cluster_is_none(text, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", text)
    assert clusters.resolve_cluster() == clusters.Cluster()
    set_slurm(monkeypatch, **STEP)
    assert clusters.resolve_cluster().num_processes == 5


@pytest.mark.parametrize(
    "jobs,role,index,message",
    [
        ({"worker": PAIR, "ps": ["c:3"]}, "worker", 0, "neither parameter"),
        ({"worker": PAIR, "evaluator": ["c:3"]}, "worker", 0, "evaluators"),
        ({"chief": PAIR}, "chief", 0, "at most one `chief`"),
        ({"worker": PAIR}, "evaluator", 0, "type `worker` or `chief`"),
        ({"worker": PAIR}, "worker", 2, "must hold the task, worker 2"),
        ({"worker": PAIR}, "worker", -1, "must hold the task, worker -1"),
        ({"worker": PAIR}, "chief", 0, "must hold the task, chief 0"),
        ({"worker": PAIR}, "worker", "x", "TF_CONFIG must look like"),
        ({"worker": 3}, "worker", 0, "TF_CONFIG must look like"),
        (["a:1"], "worker", 0, "TF_CONFIG must look like"),
        ({"worker": {"1": "b:2"}}, "worker", 0, "Received: None in"),
        ({"worker": ["a:1", "a:1"]}, "worker", 0, "must differ"),
        ({"worker": ["a:1", "b"]}, "worker", 0, "Received: 'b' in"),
    ],
)
def test_refuses_a_tf_config(jobs, role, index, message, monkeypatch):
    set_tf_config(monkeypatch, jobs, role, index)
    with pytest.raises(ValueError, match=re.escape(message)):
        clusters.resolve_cluster()


@pytest.mark.parametrize("text", ["{", "3", '{"cluster": {"worker": ["a:1"]}}'])
def test_refuses_what_is_no_tf_config(text, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(ValueError, match="TF_CONFIG"):
        clusters.resolve_cluster()


def test_slurm_counts_machines_in_its_own_order(monkeypatch):
    """As text n10 comes before n2."""
    set_slurm(monkeypatch, **STEP)
    assert clusters.resolve_cluster() == clusters.Cluster(
        ["n2:8888", "n2:8889", "n2:8890", "n10:8888", "n10:8889"], 3
    )


def test_slurm_step_of_one_task_or_none_is_alone(monkeypatch):
    set_slurm(monkeypatch, **{**STEP, "SLURM_STEP_NUM_TASKS": 1})
    assert clusters.resolve_cluster() == clusters.Cluster()
    set_slurm(monkeypatch, **STEP)
    monkeypatch.delenv("SLURM_STEP_NODELIST")
    assert clusters.resolve_cluster() == clusters.Cluster()


def test_refuses_slurm_tasks_dealt_out_in_turn(monkeypatch):
    set_slurm(monkeypatch, **{**STEP, "SLURMD_NODENAME": "n2"})
    with pytest.raises(ValueError, match="task 3 must run on n10: .*block"):
        clusters.resolve_cluster()


@pytest.mark.parametrize(
    "addresses,process_id,message",
    [
        (PAIR, None, "must be given together"),
        (None, 1, "must be given together"),
        ("a:1", 0, "must be a list"),
        (PAIR, 2, "below the number of processes, 2. Received: process_id=2"),
        (PAIR, -1, "at least 0. Received: process_id=-1"),
        ([], 1, "below the number of processes, 1"),
        (["a:1", "a:1"], 0, "must differ"),
        (["a:0"], 0, "Received: 'a:0'"),
        (["a:65536"], 0, "Received: 'a:65536'"),
        ([":1"], 0, "Received: ':1'"),
        (["a:"], 0, "Received: 'a:'"),
        (["grpc://a:1"], 0, "Received: 'grpc://a:1'"),
        (["a:1,b:2"], 0, "Received: 'a:1,b:2'"),
        ([1], 0, "Received: 1 in"),
    ],
)
def test_refuses_arguments(addresses, process_id, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        clusters.resolve_cluster(addresses, process_id)


STEPS = """
import os, signal, sys, time
import tensorflow as tf
from tensorflow.experimental import dtensor
from moe_tf.distribute import cluster as clusters

cluster = clusters.resolve_cluster()
clusters.start_cluster(cluster, 2)
mesh = dtensor.create_distributed_mesh(
    [("batch", 2), ("expert", 2)], device_type="CPU"
)
layout = dtensor.Layout(["batch", "expert"], mesh)
here = float(2 * cluster.process_id)
pieces = [tf.fill([1, 3], here + device) for device in range(2)]
values = dtensor.pack(pieces, layout)

@tf.function
def step(values):
    return tf.reduce_sum(values)

total = float(step(values))
os.write(2, f"{cluster.process_id} {total}\\n".encode())
"""


def test_two_processes_sum_over_one_mesh_and_end_by_sigterm():
    """TensorFlow takes SIGTERM and does nothing; they would be killed."""
    launcher = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "moe_tf_trainers.launch",
            "--num_processes=2",
            "--",
        ]
        + [sys.executable, "-c", STEPS + "time.sleep(100)"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    printed = ""
    try:
        while printed.count(" 18.0") < 2:
            line = launcher.stderr.readline()
            assert line, printed
            printed += line
        launcher.terminate()
        printed += launcher.communicate(timeout=60)[1]
    finally:
        launcher.kill()
        launcher.communicate()
    # Each device has three of its own number: 3 (0 + 1 + 2 + 3).
    assert re.search(r"^0 18\.0$", printed, re.M)
    assert re.search(r"^\[1\] 1 18\.0$", printed, re.M)
    assert launcher.returncode == 128 + signal.SIGTERM, printed
    assert "killing" not in printed


def start_in_many_ways():
    """Messages of the calls that fail."""
    alone, found = clusters.Cluster(), {}

    def start(name, devices, device_type="CPU"):
        try:
            clusters.start_cluster(alone, devices, device_type)
        except (ValueError, RuntimeError) as error:
            found[name] = f"{type(error).__name__}: {error}"

    start("gpus", 2, "GPU")
    os.environ["DTENSOR_JOBS"] = "a:1,b:2"
    start("environment", 3)
    del os.environ["DTENSOR_JOBS"]
    assert clusters.joined_cluster() is None
    start("first", 3)
    start("equal", 3)
    start("other", 4)
    assert clusters.joined_cluster() == alone
    return found, len(tf.config.list_logical_devices("CPU"))


@pytest.mark.thorough
def test_starts_once():
    found, devices = process.run(start_in_many_ways)
    assert devices == 3
    assert found.keys() == {"gpus", "environment", "other"}
    assert "ValueError: `devices_per_process` must be the" in found["gpus"]
    assert "devices_per_process=2, and 0 are visible" in found["gpus"]
    assert "Received: DTENSOR_JOBS=a:1,b:2" in found["environment"]
    assert "RuntimeError: A process starts once" in found["other"]


@pytest.mark.parametrize(
    "devices,device_type,message",
    [
        (0, "CPU", "`devices_per_process` must be a whole number"),
        (1, "TPU", '`device_type` must be "CPU" or "GPU"'),
    ],
)
def test_refuses_to_start(devices, device_type, message):
    with pytest.raises(ValueError, match=message):
        clusters.start_cluster(clusters.Cluster(), devices, device_type)


@pytest.mark.parametrize("before,after", [(None, "true"), ("false", "false")])
def test_gpus_leave_memory_to_nccl(before, after, monkeypatch):
    names = "DTENSOR_GPU_USE_NCCL_COMMUNICATION", "TF_FORCE_GPU_ALLOW_GROWTH"
    for name in names:
        monkeypatch.setenv(name, "")  # Undone after the test.
        monkeypatch.delenv(name)
    if before:
        monkeypatch.setenv(names[1], before)
    clusters.use_nccl("CPU")
    assert names[0] not in os.environ
    assert os.environ.get(names[1]) == before
    clusters.use_nccl("GPU")
    assert [os.environ[name] for name in names] == ["1", after]
