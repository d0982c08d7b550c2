"""Weak scaling of a mesh: collectives and time of a device.

    python -m moe_tf.benchmarks.scaling --devices=1,2,4,8

A device keeps its numbers of tokens and experts as the mesh grows, so its work
and its communication should stay constant. Virtual CPU devices run on the same
cores, so the time of a step grows with their number. The result to look at is
the count and the bytes of the collectives in the program of one device.
"""

import concurrent.futures
import multiprocessing
import statistics
import time

import keras
import numpy as np
from absl import app
from absl import flags

from moe_tf import layers
from moe_tf.benchmarks import mesh_timing
from moe_tf.distribute import MeshStrategy
from moe_tf.distribute import collectives

_DEVICES = flags.DEFINE_list("devices", ["1", "2", "4", "8"], "Mesh sizes.")
_TOKENS = flags.DEFINE_integer("tokens", 512, "Tokens of a device.", 1)
_EXPERTS = flags.DEFINE_integer("experts", 4, "Experts of a device.", 1)
_WIDTH = flags.DEFINE_integer("width", 128, "Width of a token.", 1)
_HIDDEN = flags.DEFINE_integer("hidden", 256, "Hidden units an expert.", 1)
_K = flags.DEFINE_integer("k", 4, "Experts for each token.", 1)


def measure_scaling(
    devices: int, tokens: int, experts: int, width: int, hidden: int, k: int
) -> tuple[float, dict[str, tuple[int, int]]]:
    """Measures a step's median seconds, and the collectives of one device.

    Returns:
        `(seconds, totals)`; `totals` has `(count, bytes)` by kind. The bytes
        of a collective are the size of its result on a device.
    """
    strategy = MeshStrategy({"batch": devices})
    with strategy.scope():
        model = keras.Sequential([keras.Input((tokens, width))])
        model.add(keras.layers.Dense(width))
        layer = layers.SparseMoE(
            experts * devices,
            hidden,
            k,
            capacity_factor=1.25,
            num_groups=devices,
        )
        model.add(layer)
        model.compile("sgd", "mse", jit_compile=False)
    shape = devices, tokens, width
    x_BTD = np.random.default_rng(0).normal(size=shape).astype("float32")
    batch = strategy.put_batch((x_BTD, x_BTD))
    ops = collectives.list_collectives(model.train_on_batch, *batch)
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        model.train_on_batch(*batch)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), mesh_timing.count_collectives(ops)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
    print(
        f"a device: {_TOKENS.value} tokens, {_EXPERTS.value} experts of "
        f"{_WIDTH.value}-{_HIDDEN.value}-{_WIDTH.value}, k {_K.value}"
    )
    spawn = multiprocessing.get_context("spawn")
    for devices in map(int, _DEVICES.value):
        # Devices are made before TensorFlow starts: a process each.
        with concurrent.futures.ProcessPoolExecutor(1, spawn) as pool:
            seconds, totals = pool.submit(
                measure_scaling,
                devices,
                _TOKENS.value,
                _EXPERTS.value,
                _WIDTH.value,
                _HIDDEN.value,
                _K.value,
            ).result()
        parts = [f"{devices} devices: {1e3 * seconds:.1f} ms a step"]
        parts += [
            f"{count} {kind} of {size:,} bytes"
            for kind, (count, size) in sorted(totals.items())
        ]
        print("; ".join(parts), flush=True)


if __name__ == "__main__":
    app.run(main)
