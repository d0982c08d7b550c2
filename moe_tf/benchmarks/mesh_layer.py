"""Weak scaling of one `SparseMoE`, which grows with its mesh."""

import contextlib
import functools
from collections.abc import Iterator

import numpy as np
import tensorflow as tf

from moe_tf import layers
from moe_tf.benchmarks import mesh_timing
from moe_tf.benchmarks import timing
from moe_tf.dispatch import capacity
from moe_tf.distribute import MeshStrategy
from moe_tf.distribute import collectives

# 2 kernels, 3 products each (forward and two gradients), 2 a multiply-add.
_TFLOP = 2 * 3 * 2 / 1e12
_LINK_MIB = 512  # A device's part of the large all-to-all.


def measure_layer(
    axes: dict[str, int] | None,
    device_type: str,
    tokens: int,
    experts: int,
    width: int,
    hidden: int,
    k: int = 2,
    capacity_factor: float = 1.25,
    dtype: str = "bfloat16",
    jit_compile: bool | str = "auto",
    repeats: int = 11,
    calls: int = 5,
    link_mib: int = _LINK_MIB,
) -> Iterator[dict]:
    """Times forward and backward, gradients of all weights and the inputs.

    Args:
        axes: dict with one axis, `batch`; None for no mesh.
        device_type: `"CPU"` or `"GPU"`
        tokens, experts: ints, for each device.
        width, hidden, k, capacity_factor, jit_compile: the layer's arguments.
        dtype: of the layer, its weights included.
        repeats, calls: see `timing.medians`.
        link_mib: int, size of the all-to-all that shows the rate of the links.

    Yields:
        dicts: the step, then on several devices its all-to-alls alone and
        large ones.
    """
    strategy = MeshStrategy(axes, device_type=device_type) if axes else None
    size = axes["batch"] if axes else 1
    mesh_timing.reset_keras(dtype)
    layer = _build(
        strategy,
        width,
        num_experts=experts * size,
        hidden_units=hidden,
        k=k,
        capacity_factor=capacity_factor,
        num_groups=size,
        jit_compile=jit_compile,
    )
    step, ops = _traced(layer, strategy, (tokens * size, width), dtype)
    wait = mesh_timing.wait_for_mesh if strategy else timing.wait
    seconds = timing.medians({"step": step}, repeats, calls, wait)["step"]
    yield {
        "mesh": str(axes) if axes else f"none, jit_compile={jit_compile}",
        "experts": experts * size,
        "tokens": tokens * size,
        "ms": 1e3 * seconds,
        "TFLOP/s a device": _TFLOP * tokens * k * width * hidden / seconds,
        "dropped": float(_dropped(layer)),
        **mesh_timing.collective_fields(ops),
        **mesh_timing.memory_fields(device_type, size),
    }
    if size > 1:
        slots = capacity.expert_capacity(
            tokens * k, experts * size, capacity_factor
        )
        shape = size, experts * size, slots, width
        yield mesh_timing.all_to_all_record(
            strategy, shape, dtype, repeats, seconds
        )
        yield _large_all_to_alls(strategy, link_mib, repeats)


def _build(strategy, width, **settings):
    with strategy.scope() if strategy else contextlib.nullcontext():
        layer = layers.SparseMoE(**settings)
        layer.build((None, width))
    return layer


def _large_all_to_alls(strategy, link_mib, repeats):
    size = strategy.axes["batch"]
    shape = size, size, link_mib * 2**20 // (size * 1024 * 2), 1024
    seconds, rate = mesh_timing.time_all_to_alls(
        strategy, shape, "bfloat16", 4, repeats
    )
    return {
        "mesh": f"{strategy.axes}, four all-to-alls of {link_mib} MiB",
        "ms": 1e3 * seconds,
        "GB/s a device": rate,
    }


def _traced(layer, strategy, shape, dtype):
    """Traces and runs a step once; returns it and its collectives."""
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
