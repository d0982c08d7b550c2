import pytest
import tensorflow as tf

from moe_tf.benchmarks import layer_kinds
from moe_tf.benchmarks import report

SETTING = layer_kinds.Setting(tokens=1000, width=50, hidden=100, k=2)
DENSE, GROUPED = layer_kinds.Row("dense"), layer_kinds.Row("grouped", 8)
WHOLE, LARGE = (
    layer_kinds.Row("all_experts", 8),
    layer_kinds.Row("all_experts", 64),
)
RESULTS = {
    DENSE: report.Result(0.1, 120_000_000),
    WHOLE: report.Result(0.5, 480_400_000),
    GROUPED: report.Result(0.125, None, 0.0125, 3 * 2**20),
}


def test_the_table_in_full():
    # 120 MFLOP are useful; the ceiling does 2 * 100^3 in 1 ms: 2 GFLOP/s.
    assert report.table(SETTING, RESULTS, {LARGE: "why"}, 100, 1e-3) == [
        "forward + backward       experts          ms  time/dense  rate/dense"
        "    tokens/s       GFLOP  TFLOP/s  ceiling  dropped  peak MiB",
        "product of 100 x 100           -       1.000           -           -"
        "           -       0.002    0.002     100%        -         -",
        "dense, 2000 rows               -     100.000        1.00        1.00"
        "       10000        0.12    0.001      60%        -         -",
        "all_experts                    8     500.000        5.00        0.20"
        "        2000      0.4804    0.000      12%        -         -",
        "grouped                        8     125.000        1.25        0.80"
        "        8000           -    0.001      48%    1.25%         3",
        "all_experts, 64 experts, skipped: why",
    ]


def test_speedups_are_told_beside_what_they_should_be():
    assert report.speedups(SETTING, RESULTS) == [
        "grouped, 8 experts: 4.00 times as fast as all_experts; 0.8 E/k is 3.20"
    ]


def test_no_speedup_over_what_was_skipped():
    assert report.speedups(SETTING, {DENSE: RESULTS[DENSE]}) == []
    alone = {DENSE: RESULTS[DENSE], GROUPED: RESULTS[GROUPED]}
    assert report.speedups(SETTING, alone) == []


def test_the_floor_is_the_time_of_the_weights_traffic():
    # 2 matrices x 8 experts x 50 x 100 x 4 bytes = 320 kB, three times.
    got = report.floors(SETTING, RESULTS, 48e6)
    assert got == [
        "memory: 0.0 GB/s, reads and writes",
        "8 experts: weights' traffic alone, 3 x 0.3 MiB: 20.000 ms, "
        "least time/dense 1.20",
    ]


@pytest.mark.parametrize("jit_compile", [False, True])
def test_the_machine_is_named(jit_compile):
    setting = layer_kinds.Setting(1, 1, 1, 1, "mixed_bfloat16", jit_compile)
    line = report.machine(setting)
    assert tf.__version__ in line
    assert "mixed_bfloat16" in line
    assert f"jit_compile={jit_compile}" in line
    assert "threads: 1;" in line  # as conftest.py caps them
