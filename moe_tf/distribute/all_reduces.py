"""Settings of DTensor's all-reduces, and a check that they took effect.

DTensor has a pass that merges all-reduces and thereby moves the write of a
variable past a later read in the same function. Adam then applies the moments
of the previous step, and no error is raised. The pass must be off.

All-reduces of bfloat16 are computed in float32: NCCL refuses bfloat16, and
each addition would round to 8 bits.
"""

import os

import tensorflow as tf
from tensorflow.experimental import dtensor

from moe_tf.distribute import placement

_MERGE = "DTENSOR_ENABLE_COMBINE_ALL_REDUCES_OPTIMIZATION"
_IN_FLOAT32 = {
    "DTENSOR_ENABLE_MIXED_PRECISION_REDUCE": "1",
    "DTENSOR_REDUCE_IN_BFLOAT16_MAX_GROUP_SIZE": "0",
}


def configure_environment() -> None:
    """Sets the environment variables that configure DTensor's all-reduces.

    Must be called before DTensor's first program: DTensor reads the variables
    once.

    Raises:
        RuntimeError: the environment turns the merging on.
    """
    for name, value in _IN_FLOAT32.items():
        os.environ.setdefault(name, value)
    if os.environ.setdefault(_MERGE, "0") != "0":
        raise RuntimeError(
            f"The environment has {_MERGE}={os.environ[_MERGE]}: with it "
            "DTensor reads variables before they are written, and training "
            "goes wrong unnoticed. Unset it, or set it to 0."
        )


def check_not_merged(mesh: dtensor.Mesh) -> None:
    """Runs a small program that gives wrong values if all-reduces are merged.

    Raises:
        RuntimeError: all-reduces are merged, since DTensor read the
            environment before `configure_environment` was called.
    """
    axis = max(mesh.dim_names, key=mesh.dim_size)
    size = mesh.dim_size(axis)
    if size == 1:
        return
    replicated = placement.layout(mesh, (None,))
    totals = [
        dtensor.DVariable(placement.put(tf.zeros([1]), replicated))
        for _ in range(2)
    ]

    @tf.function
    def sum_up(ones):
        read = []
        for total, part in zip(totals, (ones, ones * ones), strict=True):
            total.assign(tf.reduce_sum(part, axis=0))
            read.append(total.read_value() * 1.0)
        return read

    layout = placement.layout(mesh, (axis, None))
    ones = placement.put(tf.ones([size, 1]), layout)
    if any(placement.get(total) != size for total in sum_up(ones)):
        raise RuntimeError(
            "DTensor merges all-reduces: a program of it ran before the "
            "strategy was made, and it reads variables before they are "
            f"written. Make the strategy first, or set {_MERGE}=0 in the "
            "environment."
        )
