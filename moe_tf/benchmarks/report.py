"""The benchmark's table as text."""

import os
import pathlib
import platform
import re
import typing

import tensorflow as tf

from moe_tf.benchmarks import ways

_HEADER = ("ms", "ratio", "tokens/s", "GFLOP", "TFLOP/s", "ceiling", "dropped")
_WIDTHS = (12, 8, 12, 12, 9, 9, 9)
_MIB = 2**20


class Result(typing.NamedTuple):
    """What was measured of one row.

    Attributes:
        seconds: float, median of forward and backward.
        flops: optional int, operations of all products of the step.
        dropped: optional float, fraction of the assignments dropped.
        peak_bytes: optional int.
    """

    seconds: float
    flops: int | None = None
    dropped: float | None = None
    peak_bytes: int | None = None


def machine(setting):
    """The line that says on what the figures were taken."""
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        details = tf.config.experimental.get_device_details(gpus[0])
        name = details.get("device_name", "GPU")
    else:
        threads = tf.config.threading.get_intra_op_parallelism_threads()
        name = f"{_cpu()}, threads: {threads or len(os.sched_getaffinity(0))}"
    return (
        f"{name}; TensorFlow {tf.__version__}, {setting.dtype_policy}, "
        f"jit_compile={setting.jit_compile}"
    )


def table(setting, results, skipped, size, ceiling_seconds):
    """Lines of the table.

    Args:
        setting: `ways.Setting`.
        results: dictionary of `Result` by `ways.Row`, dense among them.
        skipped: dictionary of reasons by `ways.Row`.
        size: int, of the matrices of the ceiling.
        ceiling_seconds: float, of their product.

    Returns:
        List of strings. `ratio` is to the dense row. `TFLOP/s` and
        `ceiling`, its share of the large product's, count the operations of
        the dense row for every row: the useful ones. `GFLOP` are those that
        the row's graph does, its gate's included. The dense row stands for a
        layer that every token runs through, so its tokens are the others'.
    """
    peak = 2 * size**3 / ceiling_seconds
    dense = results[ways.Row("dense")].seconds
    lines = [
        _line("forward + backward", "experts", _HEADER, "peak MiB"),
        _line(
            f"product of {size} x {size}", "-",
            (f"{1e3 * ceiling_seconds:.3f}", "-", "-",
             f"{2 * size**3 / 1e9:.6g}", f"{peak / 1e12:.3f}", "100%", "-"),
            "-",
        ),
    ]  # fmt: skip
    for row, result in results.items():
        useful = setting.useful_flops / result.seconds
        cells = (
            f"{1e3 * result.seconds:.3f}",
            f"{result.seconds / dense:.2f}",
            f"{setting.tokens / result.seconds:.0f}",
            _or_dash(result.flops, lambda flops: f"{flops / 1e9:.6g}"),
            f"{useful / 1e12:.3f}",
            f"{useful / peak:.0%}",
            _or_dash(result.dropped, lambda part: f"{part:.2%}"),
        )
        mib = _or_dash(result.peak_bytes, lambda size: f"{size / _MIB:.0f}")
        lines.append(_line(_name(row, setting), row.num_experts, cells, mib))
    for row, reason in skipped.items():
        lines.append(f"{row.way}, {row.num_experts} experts, skipped: {reason}")
    return lines


def speedups(setting, results):
    """How much faster each way is than all experts on every token."""
    lines = []
    for row, result in results.items():
        whole = results.get(ways.Row("all_experts", row.num_experts))
        if whole is None or row.way == "all_experts":
            continue
        lines.append(
            f"{row.way}, {row.num_experts} experts: "
            f"{whole.seconds / result.seconds:.2f} times as fast as "
            f"all_experts; 0.8 E/k is {0.8 * row.num_experts / setting.k:.2f}"
        )
    return lines


def floors(setting, results, bytes_per_second):
    """The ratio that the traffic of the experts' weights alone sets.

    They are read forward, read backward, and their gradients are written;
    the dense layer's own are few. The rate is that of `steps.traffic`.
    """
    dense = results[ways.Row("dense")].seconds
    lines = [f"memory: {bytes_per_second / 1e9:.1f} GB/s, reads and writes"]
    numbers = dict.fromkeys(row.num_experts for row in results)
    for number in filter(None, numbers):
        entries = 2 * number * setting.width * setting.hidden
        weights = entries * setting.weight_bytes
        seconds = 3 * weights / bytes_per_second
        lines.append(
            f"{number} experts: weights' traffic alone, 3 x "
            f"{weights / _MIB:.1f} MiB: {1e3 * seconds:.3f} ms, ratio floor "
            f"{(dense + seconds) / dense:.2f}"
        )
    return lines


def _name(row, setting):
    if row.way == "dense":
        return f"dense, {setting.tokens * setting.k} rows"
    return row.way


def _line(name, experts, cells, last):
    columns = (
        f"{cell:>{width}}" for cell, width in zip(cells, _WIDTHS, strict=True)
    )
    return f"{name:24}{experts or '-':>8}{''.join(columns)}{last:>10}"


def _or_dash(value, text):
    return "-" if value is None else text(value)


def _cpu():
    info = pathlib.Path("/proc/cpuinfo")
    names = info.exists() and re.findall(
        r"model name\s*: (.*)", info.read_text()
    )
    return names[0] if names else platform.machine()
