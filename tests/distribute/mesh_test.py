"""Making meshes: settings that are refused, devices that are found."""

import json
import re

import pytest
import tensorflow as tf

from moe_tf.distribute import MeshStrategy
from moe_tf.distribute import cluster
from moe_tf.distribute import mesh as meshes
from moe_tf.distribute import placement
from tests import process


@pytest.mark.parametrize(
    "axes,message",
    [
        ({"expert": 2}, "must name `batch`"),
        ({"batch": 2, "experts": 2}, "must name `batch`"),
        ({"batch": 0}, "at least 1"),
        ({"batch": 2.0}, "at least 1"),
        ({"batch": "2"}, "at least 1"),
        ([("batch", 2)], "at least 1"),
        (8, "at least 1"),
    ],
)
def test_axes_are_refused(axes, message):
    with pytest.raises(ValueError, match=message):
        MeshStrategy(axes)


def test_axes_in_layouts_are_checked():
    with pytest.raises(ValueError, match="`expert`, which the mesh does not"):
        MeshStrategy({"batch": 2}, layout_map={"kernel": ("expert", None)})


def test_device_type_is_refused():
    with pytest.raises(ValueError, match="Received: device_type=NPU"):
        MeshStrategy({"batch": 2}, device_type="npu")


@pytest.mark.parametrize(
    "devices", [["CPU:0"], ["CPU:0", "CPU:0"], ["CPU:0", "GPU:1"]]
)
def test_devices_are_refused(devices):
    with pytest.raises(ValueError, match="must name 2 different devices"):
        MeshStrategy({"batch": 2}, devices=devices)


def test_too_few_accelerators():
    with pytest.raises(ValueError, match="4 GPU devices, but there are 0"):
        MeshStrategy({"batch": 2, "expert": 2}, device_type="GPU")


@pytest.mark.parametrize(
    "axes,count,expected",
    [
        ({"batch": 8}, 3, {"batch": 3}),
        ({"batch": 4, "expert": 2}, 4, {"batch": 4, "expert": 1}),
        ({"batch": 3, "expert": 3}, 7, {"batch": 3, "expert": 2}),
    ],
)
def test_nearest(axes, count, expected):
    assert meshes.nearest_axes(axes, count) == expected


def test_not_inside_another_strategy():
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        with pytest.raises(RuntimeError, match="In use: MirroredStrategy"):
            MeshStrategy({"batch": 1})


def devices(axes, **kwargs):
    mesh = MeshStrategy(axes, **kwargs).mesh
    return mesh.shape(), [d.split("device:")[1] for d in mesh.local_devices()]


def several_meshes():
    names = ["CPU:2", "CPU:1"]
    return (
        devices({"batch": 2, "expert": 1}, devices=names),
        devices({"batch": 2}),
        len(tf.config.list_logical_devices("CPU")),
    )


def test_virtual_devices():
    assert process.run(several_meshes) == (
        ([2, 1], ["CPU:2", "CPU:1"]),
        ([2], ["CPU:0", "CPU:1"]),
        3,
    )


def start_first():
    tf.constant(1.0) + 1.0
    calls = {
        "one": lambda: MeshStrategy({"batch": 4}),
        "several": lambda: cluster.start_cluster(cluster.Cluster(), 2),
    }
    found = {}
    for name, call in calls.items():
        with pytest.raises(RuntimeError) as raised:
            call()
        found[name] = str(raised.value)
    return found


def test_tensorflow_has_started():
    found = process.run(start_first)
    message = r"has started with 1.*Make the strategy before(.|\n)*'batch': 1"
    assert re.search(message, found["one"])
    assert "TensorFlow has started already. Connect" in found["several"]


CLUSTER = {"cluster": {"worker": ["localhost:9999", "localhost:9998"]}}


@pytest.fixture
def second_of_two(monkeypatch):
    place = {**CLUSTER, "task": {"type": "worker", "index": 1}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(place))


@pytest.mark.parametrize(
    "axes,told,message",
    [
        ({"batch": 3}, None, "2 processes must have equally many of the 3 dev"),
        ({"batch": 8}, "2", "take 4 devices of each.*_PER_PROCESS=2"),
    ],
)
def test_processes_that_do_not_divide(
    axes, told, message, second_of_two, monkeypatch
):
    if told:
        monkeypatch.setenv("MOE_TF_DEVICES_PER_PROCESS", told)
    with pytest.raises(ValueError, match=message):
        MeshStrategy(axes, device_type="CPU")


@pytest.mark.parametrize(
    "axes,number,parts",
    [
        ({"batch": 4}, 1, [(1, 0)]),
        ({"batch": 4}, 2, [(2, 0), (2, 1)]),
        ({"batch": 2, "expert": 2}, 2, [(2, 0), (2, 1)]),
        ({"batch": 2, "expert": 2}, 4, [(2, 0), (2, 0), (2, 1), (2, 1)]),
        ({"expert": 2, "batch": 2}, 2, [(1, 0), (1, 0)]),
        ({"expert": 2, "batch": 2}, 4, [(2, 0), (2, 1), (2, 0), (2, 1)]),
        ({"batch": 1, "expert": 2}, 2, [(1, 0), (1, 0)]),
    ],
)
def test_parts_of_processes(axes, number, parts):
    found = [placement.own_part(axes, number, i) for i in range(number)]
    assert found == parts


@pytest.mark.parametrize(
    "axes,number",
    [({"batch": 3, "expert": 2}, 2), ({"expert": 2, "batch": 3}, 3)],
)
def test_parts_that_overlap(axes, number):
    with pytest.raises(ValueError, match="whole parts of a batch: put the"):
        placement.own_part(axes, number, 0)


def test_several_processes_take_all_devices(second_of_two):
    with pytest.raises(ValueError, match="leave `devices` out"):
        MeshStrategy({"batch": 2}, devices=["CPU:0", "CPU:1"])
