"""How DTensor sums over devices: what it must not do, and what it should.

A pass that corrupts training is kept off: it merges all-reduces and thereby
moves the write of a variable past a later read in the same function. Adam then
applies the moments of the step before, and nothing fails.

Sums of bfloat16 are made in float32: NCCL refuses bfloat16, and each addition
would round to 8 bits.
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


def configure_environment():
    """Sets both in the environment, which DTensor reads once.

    To be called before its first program.

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


def check_not_merged(mesh):
    """Runs a small program that the pass would break.

    Args:
        mesh: `dtensor.Mesh`

    Raises:
        RuntimeError: the pass is on, for an earlier program of the process.
    """
    axis = max(mesh.dim_names, key=mesh.dim_size)
    size = mesh.dim_size(axis)
    if size == 1:
        return
    whole = placement.layout(mesh, (None,))
    totals = [
        dtensor.DVariable(placement.put(tf.zeros([1]), whole)) for _ in range(2)
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
