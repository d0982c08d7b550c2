"""One `SparseMoE` that grows with its mesh: weak scaling."""

import contextlib
import functools

import numpy as np
import tensorflow as tf

from moe_tf import layers
from moe_tf.benchmarks import mesh_timing
from moe_tf.benchmarks import timing
from moe_tf.dispatch import capacity
from moe_tf.distribute import MeshStrategy
from moe_tf.distribute import collectives

_LINK_MIB = 512  # What each device holds of the large all-to-all.


def measure_layer(
    axes,
    device_type,
    tokens,
    experts,
    width,
    hidden,
    k=2,
    capacity_factor=1.25,
    dtype="bfloat16",
    jit_compile="auto",
    repeats=11,
    calls=5,
    link_mib=_LINK_MIB,
):
    """Times forward and backward, gradients of all weights and the inputs.

    Args:
        axes: dict with one axis, `batch`; None for no mesh.
        device_type: `"CPU"` or `"GPU"`
        tokens, experts: ints, of each device.
        width, hidden, k, capacity_factor, jit_compile: of the layer.
        dtype: of the layer, its weights included.
        repeats, calls: see `timing.medians`.
        link_mib: int, size of the all-to-all that shows what links carry.

    Yields:
        dicts.
    """
    strategy = MeshStrategy(axes, device_type=device_type) if axes else None
    size = axes["batch"] if axes else 1
    mesh_timing.reset_keras(dtype)
    with strategy.scope() if strategy else contextlib.nullcontext():
        layer = layers.SparseMoE(
            experts * size,
            hidden,
            k,
            capacity_factor=capacity_factor,
            num_groups=size,
            jit_compile=jit_compile,
        )
        layer.build((None, width))
    step, ops = _traced(layer, strategy, (tokens * size, width), dtype)
    wait = mesh_timing.wait_for_mesh if strategy else timing.wait
    seconds = timing.medians({"step": step}, repeats, calls, wait)["step"]
    flops = 3 * 2 * 2 * tokens * k * width * hidden
    yield {
        "mesh": str(axes) if axes else f"none, jit_compile={jit_compile}",
        "experts": experts * size,
        "tokens": tokens * size,
        "ms": 1e3 * seconds,
        "TFLOP/s a device": flops / seconds / 1e12,
        "dropped": float(_dropped(layer)),
        **mesh_timing.collective_fields(ops),
        **mesh_timing.memory_fields(device_type, size),
    }
    if size == 1:
        return
    slots = capacity.expert_capacity(
        tokens * k, experts * size, capacity_factor
    )
    shape = size, experts * size, slots, width
    alone, rate = mesh_timing.time_all_to_alls(
        strategy, shape, dtype, 4, repeats
    )
    yield {
        "mesh": f"{axes}, its four all-to-alls alone",
        "ms": 1e3 * alone,
        "share of the step": alone / seconds,
        "GB/s a device": rate,
    }
    rows = link_mib * 2**20 // (size * 1024 * 2)
    shape = size, size, rows, 1024
    alone, rate = mesh_timing.time_all_to_alls(
        strategy, shape, "bfloat16", 4, repeats
    )
    yield {
        "mesh": f"{axes}, four all-to-alls of {link_mib} MiB",
        "ms": 1e3 * alone,
        "GB/s a device": rate,
    }


def _traced(layer, strategy, shape, dtype):
    """A step, traced and run once, and its collectives."""
    rng = np.random.default_rng(0)
    with tf.device("CPU") if strategy else contextlib.nullcontext():
        x_TD, dy_TD = (
            tf.cast(rng.standard_normal(shape, "float32"), dtype)
            for _ in range(2)
        )

    def forward_backward(x_TD, dy_TD):
        with tf.GradientTape() as tape:
            tape.watch(x_TD)
            y_TD = layer(x_TD, training=True)
            losses = list(layer.losses)
        gradients = tape.gradient(
            [y_TD, *losses],
            [x_TD, *[v.value for v in layer.trainable_variables]],
            output_gradients=[dy_TD, *map(tf.ones_like, losses)],
        )
        return [y_TD, *map(tf.convert_to_tensor, gradients)]

    if strategy is None:
        step = tf.function(forward_backward, autograph=False)
        step(x_TD, dy_TD)
        return lambda: step(x_TD, dy_TD), []

    @functools.partial(tf.function, autograph=False)
    def step(x_TD, dy_TD):
        return strategy.run(forward_backward, (x_TD, dy_TD))

    batch = strategy.put_batch((x_TD, dy_TD), whole=True)
    ops = collectives.list_collectives(step, *batch)
    return lambda: step(*batch), ops


def _dropped(layer):
    assigned, dropped = (
        np.sum(vector.numpy())
        for vector in (layer.balance.assigned_E, layer.balance.dropped_E)
    )
    return dropped / assigned
