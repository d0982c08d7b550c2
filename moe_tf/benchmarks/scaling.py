"""What a mesh costs when it grows with its experts and tokens.

    python -m moe_tf.benchmarks.scaling --devices=1,2,4,8

Weak scaling: tokens and experts of a device stay, and so should its work and
what it sends. Virtual CPU devices share the cores of the machine, so the time
of a step grows with them; what counts are the number and the bytes of the
collectives, read from the program of one device.
"""

import collections
import concurrent.futures
import multiprocessing
import statistics
import time

import keras
import numpy as np
from absl import app
from absl import flags

from moe_tf import layers
from moe_tf.distribute import MeshStrategy
from moe_tf.distribute import collectives

_DEVICES = flags.DEFINE_list("devices", ["1", "2", "4", "8"], "Mesh sizes.")
_TOKENS = flags.DEFINE_integer("tokens", 512, "Tokens of a device.", 1)
_EXPERTS = flags.DEFINE_integer("experts", 4, "Experts of a device.", 1)
_WIDTH = flags.DEFINE_integer("width", 128, "Width of a token.", 1)
_HIDDEN = flags.DEFINE_integer("hidden", 256, "Hidden units an expert.", 1)
_K = flags.DEFINE_integer("k", 4, "Experts for each token.", 1)


def measure(devices, tokens, experts, width, hidden, k):
    """Median seconds of a step, and the collectives of one device.

    Returns:
        `(seconds, found)`; `found` is a dict of `(number, bytes)` by kind. A
        collective's bytes are those of what it gives on a device.
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
    found = collections.defaultdict(lambda: [0, 0])
    for op in collectives.list_collectives(model.train_on_batch, *batch):
        found[op.kind][0] += 1
        found[op.kind][1] += op.bytes
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        model.train_on_batch(*batch)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), dict(found)


def main(argv):
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
            seconds, found = pool.submit(
                measure,
                devices,
                _TOKENS.value,
                _EXPERTS.value,
                _WIDTH.value,
                _HIDDEN.value,
                _K.value,
            ).result()
        parts = [f"{devices} devices: {1e3 * seconds:.1f} ms a step"]
        parts += [
            f"{number} {kind} of {size:,} bytes"
            for kind, (number, size) in sorted(found.items())
        ]
        print("; ".join(parts), flush=True)


if __name__ == "__main__":
    app.run(main)
