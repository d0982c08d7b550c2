"""Times, collectives and memory of the devices of a mesh."""

import collections
import functools
import math
from collections.abc import Callable
from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf
from tensorflow.experimental import dtensor

from moe_tf.benchmarks import timing
from moe_tf.distribute import MeshStrategy
from moe_tf.distribute import collectives


def wait_for_mesh(tensors: list[tf.Tensor]) -> None:
    """Waits until every device of this process has the last tensor."""
    for part in dtensor.unpack(tensors[-1]):
        tf.reshape(part, (-1,))[:1].numpy()


def all_to_alls(
    strategy: MeshStrategy, shape_GECD: Sequence[int], dtype: str, count: int
) -> Callable[[], list[tf.Tensor]]:
    """Makes a function of nothing but all-to-alls, to the experts and back.

    Args:
        strategy: `MeshStrategy` whose axis `batch` has several devices.
        shape_GECD: token groups, experts, slots and width.
        dtype: name of a dtype.
        count: int, even; all-to-alls of a call.

    Returns:
        A function that returns a list of one DTensor.
    """
    groups_first = ("batch", None, None, None)
    experts_first = (None, "batch", None, None)

    def round_trips(x_GECD):
        for _ in range(count // 2):
            x_GECD = strategy.constrain(x_GECD, *experts_first)
            x_GECD = strategy.constrain(x_GECD, *groups_first)
        return x_GECD

    @functools.partial(tf.function, autograph=False)
    def run(x_GECD):
        return strategy.run(round_trips, (x_GECD,))

    # Not all zeros, but without a large array of random values.
    shape = tuple(shape_GECD)
    host = np.arange(shape[0], dtype="float32").reshape(-1, 1, 1, 1)
    with tf.device("CPU"):
        x_GECD = tf.broadcast_to(tf.cast(host, dtype), shape)
    x_GECD = strategy.put_batch(x_GECD, whole=True)
    counts = count_collectives(collectives.list_collectives(run, x_GECD))
    if counts.get("all-to-all", (0, 0))[0] != count:
        raise ValueError(f"Not {count} all-to-alls: {counts}")
    return lambda: [run(x_GECD)]


def time_all_to_alls(
    strategy: MeshStrategy,
    shape_GECD: Sequence[int],
    dtype: str,
    count: int,
    repeats: int,
) -> tuple[float, float]:
    """Times all-to-alls, and computes the rate at which links carry them.

    The time is what `count` further all-to-alls add to a call. The overhead
    of the call itself is left out, since a step has none. The part of an
    all-to-all's result that was on the device before does not cross a link.

    Returns:
        `(seconds, rate)`, the rate in GB/s for each device. Both are NaN if
        the further all-to-alls added no time, as on a busy machine.
    """
    times = 8
    calls = {
        number: all_to_alls(strategy, shape_GECD, dtype, number)
        for number in (count, (1 + times) * count)
    }
    few, many = timing.medians(calls, repeats, wait=wait_for_mesh).values()
    seconds = (many - few) / times if many > few else math.nan
    size = strategy.axes["batch"]
    entries = np.prod(shape_GECD, dtype="int64") // size
    num_bytes = entries * tf.as_dtype(dtype).size
    crossing = count * num_bytes * (size - 1) / size
    return seconds, crossing / seconds / 1e9


def all_to_all_record(
    strategy: MeshStrategy,
    shape_GECD: Sequence[int],
    dtype: str,
    repeats: int,
    step_seconds: float,
) -> dict:
    """Makes the record of a step's four all-to-alls, timed alone."""
    seconds, rate = time_all_to_alls(strategy, shape_GECD, dtype, 4, repeats)
    return {
        "mesh": f"{strategy.axes}, its four all-to-alls alone",
        "ms": 1e3 * seconds,
        "fraction of the step": seconds / step_seconds,
        "GB/s a device": rate,
    }


def count_collectives(
    ops: list[collectives.Collective],
) -> dict[str, tuple[int, int]]:
    """Returns `(count, bytes)` of collectives, by kind."""
    totals = collections.defaultdict(lambda: [0, 0])
    for op in ops:
        totals[op.kind][0] += 1
        totals[op.kind][1] += op.bytes
    return {kind: tuple(pair) for kind, pair in totals.items()}


def collective_fields(ops: list[collectives.Collective]) -> dict[str, str]:
    """Makes fields of a record: count and MiB of each kind of collective."""
    return {
        kind: f"{count}, {size / 2**20:.3f} MiB"
        for kind, (count, size) in sorted(count_collectives(ops).items())
    }


def memory_fields(device_type: str, num_devices: int) -> dict[str, str]:
    """Makes a field of a record: the peak MiB of each GPU."""
    if device_type != "GPU":
        return {}
    peaks = [
        tf.config.experimental.get_memory_info(f"GPU:{index}")["peak"]
        for index in range(num_devices)
    ]
    return {"peak_MiB": ", ".join(f"{size / 2**20:.0f}" for size in peaks)}


def reset_keras(policy: str) -> None:
    """Resets Keras's state and seed, and sets a dtype policy."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(policy)
