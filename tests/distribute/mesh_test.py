"""Making meshes: settings that are refused, devices that are found."""

import pytest
import tensorflow as tf

from moe_tf.distribute import MeshStrategy
from moe_tf.distribute import mesh as meshes
from tests.distribute import process


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
    assert meshes.nearest(axes, count) == expected


def test_not_inside_another_strategy():
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        with pytest.raises(RuntimeError, match="In use: MirroredStrategy"):
            MeshStrategy({"batch": 1})


def devices(axes, **kwargs):
    mesh = MeshStrategy(axes, **kwargs).mesh
    return mesh.shape(), [d.split("device:")[1] for d in mesh.local_devices()]


@pytest.mark.parametrize(
    "names,expected",
    [(None, ["CPU:0", "CPU:1"]), (["CPU:2", "CPU:1"], ["CPU:2", "CPU:1"])],
)
def test_virtual_devices(names, expected):
    call = process.run(two_devices, names)
    assert call == ([2, 1], expected)


def two_devices(names):
    return devices({"batch": 2, "expert": 1}, devices=names)


def start_first():
    tf.constant(1.0) + 1.0
    MeshStrategy({"batch": 4})


def test_tensorflow_has_started():
    message = r"has started with 1.*Make the strategy before(.|\n)*'batch': 1"
    with pytest.raises(process.Failed, match=message):
        process.run(start_first)


def twice():
    MeshStrategy({"batch": 4})
    return devices({"batch": 2})


def test_a_second_smaller_mesh():
    assert process.run(twice) == ([2], ["CPU:0", "CPU:1"])
