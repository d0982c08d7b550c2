"""What the devices of a mesh take, send and hold."""

import collections
import functools
import math

import keras
import numpy as np
import tensorflow as tf
from tensorflow.experimental import dtensor

from moe_tf.benchmarks import timing
from moe_tf.distribute import collectives


def wait_for_mesh(tensors):
    """Waits until every device of this process has the last tensor."""
    for part in dtensor.unpack(tensors[-1]):
        tf.reshape(part, (-1,))[:1].numpy()


def all_to_alls(strategy, shape_GECD, dtype, number):
    """A function that does nothing but all-to-alls, there and back.

    Args:
        strategy: `MeshStrategy` whose axis `batch` has several devices.
        shape_GECD: groups, experts, slots and width.
        dtype: name.
        number: int, even; all-to-alls of a call.

    Returns:
        A function that returns a list of one DTensor.
    """
    groups_first = ("batch", None, None, None)
    experts_first = (None, "batch", None, None)

    def there_and_back(x_GECD):
        for _ in range(number // 2):
            x_GECD = strategy.constrain(x_GECD, *experts_first)
            x_GECD = strategy.constrain(x_GECD, *groups_first)
        return x_GECD

    @functools.partial(tf.function, autograph=False)
    def run(x_GECD):
        return strategy.run(there_and_back, (x_GECD,))

    # Bits other than zeros, without a large array of random numbers.
    shape = tuple(shape_GECD)
    host = np.arange(shape[0], dtype="float32").reshape(-1, 1, 1, 1)
    with tf.device("CPU"):
        x_GECD = tf.broadcast_to(tf.cast(host, dtype), shape)
    x_GECD = strategy.put_batch(x_GECD, whole=True)
    found = count_collectives(collectives.list_collectives(run, x_GECD))
    if found.get("all-to-all", (0, 0))[0] != number:
        raise ValueError(f"Not {number} all-to-alls: {found}")
    return lambda: [run(x_GECD)]


def time_all_to_alls(strategy, shape_GECD, dtype, number, repeats):
    """Seconds of such all-to-alls, and what crosses the links for a device.

    Seconds are what `number` more take within a call, so that those of the
    call itself do not count, as they would not in a step. Of what an
    all-to-all gives on a device, the part that was there before does not
    cross.

    Returns:
        `(seconds, GB/s)`; NaN where more take no longer on a busy machine.
    """
    times = 8
    calls = {
        count: all_to_alls(strategy, shape_GECD, dtype, count)
        for count in (number, (1 + times) * number)
    }
    few, many = timing.medians(calls, repeats, wait=wait_for_mesh).values()
    seconds = (many - few) / times if many > few else math.nan
    size = strategy.axes["batch"]
    held = np.prod(shape_GECD, dtype="int64") // size * tf.as_dtype(dtype).size
    crossing = number * held * (size - 1) / size
    return seconds, crossing / seconds / 1e9


def count_collectives(ops):
    """`{kind: (number, bytes)}` of a list of `Collective`s."""
    found = collections.defaultdict(lambda: [0, 0])
    for op in ops:
        found[op.kind][0] += 1
        found[op.kind][1] += op.bytes
    return {kind: tuple(pair) for kind, pair in found.items()}


def collective_fields(ops):
    """Entries of a record: each kind of collective: how many, MiB in all."""
    return {
        kind: f"{number}, {size / 2**20:.3f} MiB"
        for kind, (number, size) in sorted(count_collectives(ops).items())
    }


def memory_fields(device_type, number):
    """Entries of a record: the most MiB that each GPU has had in use."""
    if device_type != "GPU":
        return {}
    found = [
        tf.config.experimental.get_memory_info(f"GPU:{index}")["peak"]
        for index in range(number)
    ]
    return {"peak_MiB": ", ".join(f"{size / 2**20:.0f}" for size in found)}


def reset_keras(policy):
    """A fresh state of Keras."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(policy)
