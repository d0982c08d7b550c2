"""Table of the layer benchmark, as lines of text."""

import os
import pathlib
import platform
import re
import typing

import tensorflow as tf

from moe_tf.benchmarks import layer_kinds

_HEADER = (
    *("ms", "time/dense", "rate/dense", "tokens/s"),
    *("GFLOP", "TFLOP/s", "ceiling", "dropped"),
)
_WIDTHS = (12, 12, 12, 12, 12, 9, 9, 9)
_MIB = 2**20


class Result(typing.NamedTuple):
    """Measurements of one row.

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


def machine(setting: layer_kinds.Setting) -> str:
    """Returns a line with the device, TensorFlow's version and settings."""
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


def table(
    setting: layer_kinds.Setting,
    results: dict[layer_kinds.Row, Result],
    skipped: dict[layer_kinds.Row, str],
    size: int,
    ceiling_seconds: float,
) -> list[str]:
    """Returns the lines of the table.

    Args:
        setting: `layer_kinds.Setting`.
        results: dictionary of `Result` by `layer_kinds.Row`, dense among them.
        skipped: dictionary of reasons by `layer_kinds.Row`.
        size: int, of the matrices of the ceiling.
        ceiling_seconds: float, of their product.

    Returns:
        List of strings. `time/dense` is the row's time over the dense row's
        and `rate/dense`, the inverse, its tokens a second over the dense
        row's. `TFLOP/s` counts useful operations, those of the dense row,
        for every row; `ceiling` divides that rate by the large product's.
        `GFLOP` counts all products of the row's graph, the gate's included.
        `tokens/s` of the dense row are tokens too, although `k` rows of its
        input stand for each token.
    """
    peak = 2 * size**3 / ceiling_seconds
    dense = results[layer_kinds.Row("dense")].seconds
    lines = [
        _line("forward + backward", "experts", _HEADER, "peak MiB"),
        _line(
            f"product of {size} x {size}", "-",
            (f"{1e3 * ceiling_seconds:.3f}", "-", "-",
             "-", f"{2 * size**3 / 1e9:.6g}", f"{peak / 1e12:.3f}", "100%",
             "-"),
            "-",
        ),
    ]  # fmt: skip
    for row, result in results.items():
        useful = setting.useful_flops / result.seconds
        cells = (
            f"{1e3 * result.seconds:.3f}",
            f"{result.seconds / dense:.2f}",
            f"{dense / result.seconds:.2f}",
            f"{setting.tokens / result.seconds:.0f}",
            _or_dash(result.flops, lambda flops: f"{flops / 1e9:.6g}"),
            f"{useful / 1e12:.3f}",
            f"{useful / peak:.0%}",
            _or_dash(result.dropped, lambda fraction: f"{fraction:.2%}"),
        )
        mib = _or_dash(result.peak_bytes, lambda size: f"{size / _MIB:.0f}")
        lines.append(_line(_name(row, setting), row.num_experts, cells, mib))
    for row, reason in skipped.items():
        lines.append(
            f"{row.kind}, {row.num_experts} experts, skipped: {reason}"
        )
    return lines


def speedups(
    setting: layer_kinds.Setting, results: dict[layer_kinds.Row, Result]
) -> list[str]:
    """Returns lines with each kind's speed-up over `all_experts`."""
    lines = []
    for row, result in results.items():
        slow = layer_kinds.Row("all_experts", row.num_experts)
        baseline = results.get(slow)
        if baseline is None or row.kind == "all_experts":
            continue
        lines.append(
            f"{row.kind}, {row.num_experts} experts: "
            f"{baseline.seconds / result.seconds:.2f} times as fast as "
            f"all_experts; 0.8 E/k is {0.8 * row.num_experts / setting.k:.2f}"
        )
    return lines


def floors(
    setting: layer_kinds.Setting,
    results: dict[layer_kinds.Row, Result],
    bytes_per_second: float,
) -> list[str]:
    """Returns lines with the least `time/dense` that memory traffic allows.

    A step reads the weights of all experts twice, forward and backward, and
    writes their gradients. The dense layer's weights are too few to count.

    Args:
        setting: `layer_kinds.Setting`.
        results: dictionary of `Result`, the dense row among them.
        bytes_per_second: float, the rate of `steps.traffic`.
    """
    dense = results[layer_kinds.Row("dense")].seconds
    lines = [f"memory: {bytes_per_second / 1e9:.1f} GB/s, reads and writes"]
    counts = dict.fromkeys(row.num_experts for row in results)
    for num_experts in filter(None, counts):
        entries = 2 * num_experts * setting.width * setting.hidden
        weights = entries * setting.weight_bytes
        seconds = 3 * weights / bytes_per_second
        lines.append(
            f"{num_experts} experts: weights' traffic alone, 3 x "
            f"{weights / _MIB:.1f} MiB: {1e3 * seconds:.3f} ms, least "
            f"time/dense {(dense + seconds) / dense:.2f}"
        )
    return lines


def _name(row, setting):
    if row.kind == "dense":
        return f"dense, {setting.tokens * setting.k} rows"
    return row.kind


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
