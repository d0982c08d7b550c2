"""Medians of functions that take turns."""

import statistics
import time

import tensorflow as tf


def medians(functions, repeats, calls=1, wait=None):
    """Median seconds of a call of each function.

    They take turns, so that a slow moment of the machine falls on all of
    them. A sample is `calls` calls, one after the other, and a wait for the
    last: on a GPU, where a call returns before its work is done, `calls = 1`
    measures the launch too.

    Args:
        functions: dictionary of functions that return a list of tensors.
        repeats: int, samples of each.
        calls: int, calls of each sample.
        wait: function that waits for such a list. Defaults to `wait`, which
            is for tensors of one device.

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


def wait(tensors):
    """Waits for a list of tensors by fetching an entry of the last.

    A device works in the order of the calls.
    """
    tf.reshape(tensors[-1], (-1,))[:1].numpy()


_wait = wait
