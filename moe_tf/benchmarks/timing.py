"""Median times of functions that take turns."""

import statistics
import time
from collections.abc import Callable

import tensorflow as tf


def medians(
    functions: dict[str, Callable[[], list[tf.Tensor]]],
    repeats: int,
    calls: int = 1,
    wait: Callable[[list[tf.Tensor]], None] | None = None,
) -> dict[str, float]:
    """Measures the median seconds of a call of each function.

    The functions take turns, so that a slow moment of the machine affects all
    of them. A sample is `calls` consecutive calls and a wait for the last one.
    On a GPU, where a call returns before its work is done, `calls=1` includes
    the launch.

    Args:
        functions: dictionary of functions that return a list of tensors.
        repeats: int, samples of each.
        calls: int, calls of each sample.
        wait: function that waits for a list of tensors. Defaults to `wait`
            of this module, for tensors of one device.

    Returns:
        Dictionary of floats.
    """
    wait = wait or _wait
    for function in functions.values():  # trace, compile, warm up
        wait(function())
        wait(function())
    samples = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(calls - 1):
                function()
            wait(function())
            samples[name].append((time.perf_counter() - start) / calls)
    return {name: statistics.median(taken) for name, taken in samples.items()}


def wait(tensors: list[tf.Tensor]) -> None:
    """Waits for a list of tensors by fetching one entry of the last.

    That suffices, since a device works in the order of the calls.
    """
    tf.reshape(tensors[-1], (-1,))[:1].numpy()


_wait = wait
