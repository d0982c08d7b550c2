"""Cost of the mixture-of-experts layer against a dense layer of equal work.

    moe-tf-benchmark --experts=8,32

Times forward and backward passes in training, the layer's losses included, of
a dense layer fed `tokens * k` rows, of every expert on every token (the usual
form in Keras), and of `SparseMoE`: dropless (`grouped`), with capacity factors
(`capacity:1.25`) and with two levels of experts (`two_level:16`). All layers
take turns in one run, and figures are medians. A `time/dense` of 1 means that
routing, dispatch and balancing cost nothing beside the experts' products.
`rate/dense` is its inverse.

The first row of the table is the ceiling, one large product. `TFLOP/s` and
`ceiling` count useful operations alone, those of the dense row. `GFLOP` are
the products of the row's own graph, 2 a multiply-add, its gate's included.

On a GPU, where single calls measure their launch:

    moe-tf-benchmark --tokens=16384 --width=1024 --hidden=4096 --k=2 \\
        --experts=8,64 --dtype_policy=bfloat16 --jit_compile=true \\
        --calls=10 --repeats=21 --ceiling=8192 --all_experts_gib=32
"""

import keras
import tensorflow as tf
from absl import app
from absl import flags

from moe_tf.benchmarks import layer_kinds
from moe_tf.benchmarks import memory
from moe_tf.benchmarks import report
from moe_tf.benchmarks import steps
from moe_tf.benchmarks import timing
from moe_tf.routing import registry

_EXPERTS = flags.DEFINE_list(
    "experts", ["8", "32", "256"], "Numbers of experts."
)
_LAYERS = flags.DEFINE_list(
    "layers",
    ["all_experts", "grouped", "capacity:1.0", "capacity:1.25"],
    f"Rows for each number of experts: {', '.join(layer_kinds.NAMES[1:])}.",
)
_TOKENS = flags.DEFINE_integer("tokens", 4096, "Tokens a call.", 1)
_WIDTH = flags.DEFINE_integer("width", 512, "Width of a token.", 1)
_HIDDEN = flags.DEFINE_integer("hidden", 1024, "Hidden units an expert.", 1)
_K = flags.DEFINE_integer("k", 4, "Experts for each token.", 1)
_DTYPE_POLICY = flags.DEFINE_enum(
    "dtype_policy",
    "float32",
    ["float32", "mixed_bfloat16", "bfloat16"],
    "Of all layers.",
)
_GATING = flags.DEFINE_enum(
    "gating", "noisy_top_k", list(registry.ROUTERS), "Of `SparseMoE`."
)
_ACTIVATION = flags.DEFINE_string(
    "activation", "relu", "Inside experts and the dense layer."
)
_JIT_COMPILE = flags.DEFINE_bool("jit_compile", False, "Compile with XLA.")
_REPEATS = flags.DEFINE_integer("repeats", 9, "Samples of each layer.", 3)
_CALLS = flags.DEFINE_integer("calls", 1, "Calls a sample.", 1)
_CEILING = flags.DEFINE_integer(
    "ceiling", 4096, "Rows and columns of the ceiling's matrices.", 1
)
_TRAFFIC_MIB = flags.DEFINE_integer(
    "traffic_mib", 256, "Size of each array that measures the memory.", 1
)
_ALL_EXPERTS_GIB = flags.DEFINE_float(
    "all_experts_gib",
    4.0,
    "Skip all_experts where its activations would take more than this.",
    0,
)
_MEMORY = flags.DEFINE_bool(
    "memory",
    False,
    "Measure peak memory on a CPU too, by running each row once more in a "
    "process of its own (Linux). On a GPU it is measured always.",
)


@flags.validator("experts")
def _are_counts(experts):
    if not all(count.isdecimal() and int(count) > 0 for count in experts):
        raise flags.ValidationError("whole numbers of at least 1 are needed")
    return _distinct(list(map(int, experts)))


@flags.validator("layers")
def _are_kinds(names):
    try:
        parsed = list(map(layer_kinds.parse_kind, names))
    except ValueError as error:
        raise flags.ValidationError(str(error)) from error
    if "dense" in names:
        raise flags.ValidationError("dense is always there, and once")
    return _distinct(parsed)  # `capacity:1` and `capacity:1.0` are one kind


@flags.validator("activation")
def _is_activation(name):
    try:
        keras.activations.get(name)
    except ValueError as error:
        raise flags.ValidationError(str(error)) from error
    return True


def _distinct(values):
    if not values or len(set(values)) < len(values):
        raise flags.ValidationError("there must be one, and none twice")
    return True


@flags.multi_flags_validator(["experts", "k"])
def _are_at_least_k(values):
    for num_experts in map(int, values["experts"]):
        if num_experts < values["k"]:
            raise flags.ValidationError(
                "`k` must be between 1 and `num_experts`. "
                f"Received: k={values['k']}, num_experts={num_experts}"
            )
    return True


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
    setting = layer_kinds.Setting(
        _TOKENS.value, _WIDTH.value, _HIDDEN.value, _K.value,
        _DTYPE_POLICY.value, _JIT_COMPILE.value, _GATING.value,
        _ACTIVATION.value,
    )  # fmt: skip
    rows = layer_kinds.table_rows(_LAYERS.value, map(int, _EXPERTS.value))
    for row in rows:  # Refuses wrong settings before it measures.
        layer_kinds.make_layer(row, setting)
    print(report.machine(setting))
    print(
        f"{setting.tokens} tokens, width {setting.width}, hidden "
        f"{setting.hidden}, k {setting.k}; {setting.gating}, "
        f"{setting.activation}; medians of {_REPEATS.value} samples, calls a "
        f"sample: {_CALLS.value}",
        flush=True,
    )
    skipped = too_large(rows, setting)
    rows = [row for row in rows if row not in skipped]
    results, ceiling, rate = measure_rows(rows, setting)
    for line in (
        *report.table(setting, results, skipped, _CEILING.value, ceiling),
        *report.speedups(setting, results),
        *report.floors(setting, results, rate),
    ):
        print(line)


def too_large(
    rows: list[layer_kinds.Row], setting: layer_kinds.Setting
) -> dict[layer_kinds.Row, str]:
    """Returns the reason why a row is skipped, for rows that do not fit."""
    reasons = {}
    for row in rows:
        if row.kind != "all_experts":
            continue
        gib = layer_kinds.all_experts_bytes(row.num_experts, setting) / 2**30
        if gib > _ALL_EXPERTS_GIB.value:
            reasons[row] = (
                f"its activations alone take {gib:.3g} GiB, more than "
                f"--all_experts_gib={_ALL_EXPERTS_GIB.value:g}"
            )
    return reasons


def measure_rows(
    rows: list[layer_kinds.Row], setting: layer_kinds.Setting
) -> tuple[dict[layer_kinds.Row, report.Result], float, float]:
    """Measures all rows in turns.

    Returns:
        `(results, seconds, bytes_per_second)`: `report.Result` by row, the
        time of the ceiling's product, the rate of `steps.traffic`.
    """
    on_gpu = bool(tf.config.list_physical_devices("GPU"))
    peaks = dict.fromkeys(rows)
    if _MEMORY.value and not on_gpu:
        peaks = {row: memory.in_own_process(row, setting) for row in rows}
    keras.utils.set_random_seed(0)
    layers = {}
    for row in rows:
        if on_gpu:
            layers[row], peaks[row] = memory.on_gpu(row, setting)
        else:
            layers[row] = layer_kinds.train_step(row, setting)
    traffic_bytes = _TRAFFIC_MIB.value * 2**20
    limits = {
        "ceiling": steps.ceiling(
            _CEILING.value, setting.compute_dtype, setting.jit_compile
        ),
        "traffic": steps.traffic(traffic_bytes),
    }
    seconds = timing.medians({**limits, **layers}, _REPEATS.value, _CALLS.value)
    results = {
        row: report.Result(
            seconds[row], step.flops(), step.dropped(), peaks[row]
        )
        for row, step in layers.items()
    }
    return results, seconds["ceiling"], 3 * traffic_bytes / seconds["traffic"]


def run() -> None:
    app.run(main)


if __name__ == "__main__":
    run()
