"""Peak memory of one layer's training."""

import concurrent.futures
import multiprocessing
import pathlib
import re

import keras
import tensorflow as tf

from moe_tf.benchmarks import layer_kinds
from moe_tf.benchmarks import timing

_STATUS = pathlib.Path("/proc/self/status")
_GPU = "GPU:0"


def in_own_process(row, setting):
    """Bytes by which a process grows that runs this row alone.

    Weights, inputs, activations, gradients, the graph, and XLA's compiler
    where it is used. Linux only.
    """
    # A fresh interpreter: TensorFlow does not survive a fork. And `VmHWM`,
    # since `ru_maxrss` starts at the parent's size even after `exec`.
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn) as pool:
        return pool.submit(_grown, row, setting).result()


def on_gpu(row, setting):
    """The step of a row, run, and the bytes of the GPU it took at most.

    Weights and inputs count, and so do activations and gradients; other
    layers that are alive do not, nor what choosing kernels took.
    """
    before = tf.config.experimental.get_memory_info(_GPU)["current"]
    step = layer_kinds.train_step(row, setting)
    timing.wait(step())
    tf.config.experimental.reset_memory_stats(_GPU)
    timing.wait(step())
    peak = tf.config.experimental.get_memory_info(_GPU)["peak"]
    return step, peak - before


def _grown(row, setting):
    keras.utils.set_random_seed(0)
    before = high_water()
    step = layer_kinds.train_step(row, setting)
    timing.wait(step())
    timing.wait(step())
    return high_water() - before


def high_water():
    """The most bytes that this process has had in memory. Linux only."""
    (kibibytes,) = re.findall(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
    return 1024 * int(kibibytes)
