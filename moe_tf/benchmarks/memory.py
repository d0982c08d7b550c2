"""Peak memory of one layer's training."""

import concurrent.futures
import multiprocessing
import pathlib
import re

import keras
import tensorflow as tf

from moe_tf.benchmarks import layer_kinds
from moe_tf.benchmarks import steps
from moe_tf.benchmarks import timing

_STATUS = pathlib.Path("/proc/self/status")
_GPU = "GPU:0"


def in_own_process(row: layer_kinds.Row, setting: layer_kinds.Setting) -> int:
    """Measures by how many bytes a fresh process grows that runs one row.

    Includes weights, inputs, activations, gradients, the graph, and XLA's
    compiler where it is used. Linux only.
    """
    # A fresh interpreter, since TensorFlow does not survive a fork. `VmHWM`,
    # since `ru_maxrss` starts at the parent's size even after `exec`.
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn) as pool:
        return pool.submit(_grown, row, setting).result()


def on_gpu(
    row: layer_kinds.Row, setting: layer_kinds.Setting
) -> tuple[steps.TrainStep, int]:
    """Makes and runs the step of a row, and measures its peak GPU memory.

    Weights, inputs, activations and gradients count. Other layers that are
    alive do not count, nor the memory for choosing kernels.

    Returns:
        `(step, peak)`, the peak in bytes.
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


def high_water() -> int:
    """Returns the peak resident bytes of this process. Linux only."""
    (kibibytes,) = re.findall(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
    return 1024 * int(kibibytes)
