"""The benchmark as users run it. No time decides a test."""

import subprocess
import sys

import pytest
from absl import flags

from moe_tf.benchmarks import layer_kinds
from tests import process

SMALL = (
    "--tokens=32", "--width=8", "--hidden=16", "--k=2", "--repeats=3",
    "--ceiling=64", "--traffic_mib=1",
)  # fmt: skip
USEFUL = layer_kinds.Setting(tokens=32, width=8, hidden=16, k=2).useful_flops
GATE = 3 * 2 * 32 * 8  # for each expert
HALF_MS, HALF_RATIO, HALF_RATE = 0.0005, 0.005, 0.5  # of the last digit


def run(*flags):
    """The exit code, and what was printed to standard output and error."""
    result = process.run_program("moe_tf_trainers.benchmark", *flags)
    return result.returncode, result.stdout.decode(), result.stderr.decode()


def printed(*flags):
    """The lines: two of setting, the table's cells by row, what follows."""
    code, told, error = run(*SMALL, *flags)
    assert code == 0, error
    *setting, header, ceiling, dense = told.splitlines()[:5]
    assert header.split()[-10:] == [
        "ms", "time/dense", "rate/dense", "tokens/s", "GFLOP",
        "TFLOP/s", "ceiling", "dropped", "peak", "MiB",
    ]  # fmt: skip
    assert ceiling.startswith("product of 64 x 64")
    assert dense.startswith("dense, 64 rows")
    rows = {("dense", "-"): dense.split()[4:]}
    rest = told.splitlines()[5:]
    while rest and len(rest[0].split()) == 11:
        way, number, *cells = rest.pop(0).split()
        rows[way, number] = cells
    return setting, rows, rest


def assert_consistent(rows):
    """Of what was divided, more digits were known than are printed."""
    dense = float(rows["dense", "-"][0])
    for cells in rows.values():
        taken, ratio, inverse, rate = map(float, cells[:4])
        assert (inverse - HALF_RATIO) * (taken - HALF_MS) <= dense + HALF_MS
        assert (inverse + HALF_RATIO) * (taken + HALF_MS) >= dense - HALF_MS
        assert (ratio - HALF_RATIO) * (dense - HALF_MS) <= taken + HALF_MS
        assert (ratio + HALF_RATIO) * (dense + HALF_MS) >= taken - HALF_MS
        assert (rate - HALF_RATE) * (taken - HALF_MS) / 1e3 <= 32
        assert (rate + HALF_RATE) * (taken + HALF_MS) / 1e3 >= 32


def test_prints_every_row_and_what_it_costs():
    setting, rows, rest = printed(
        "--experts=2,4", "--layers=all_experts,grouped,capacity:0.5"
    )
    assert "float32, jit_compile=False" in setting[0]
    assert setting[1].startswith(
        "32 tokens, width 8, hidden 16, k 2; noisy_top_k, relu; medians"
    )
    names = ["all_experts", "grouped", "capacity:0.5"]
    assert list(rows) == [
        ("dense", "-"),
        *((name, number) for number in "24" for name in names),
    ]
    assert rows["dense", "-"][1] == "1.00"
    assert_consistent(rows)
    gigaflops = {row: float(cells[4]) for row, cells in rows.items()}
    flops = {row: 1e9 * value for row, value in gigaflops.items()}
    assert flops["dense", "-"] == pytest.approx(USEFUL, rel=1e-5)
    for number in (2, 4):
        gate = number * GATE
        for way, want in (
            ("all_experts", USEFUL * number // 2 + gate),
            ("grouped", USEFUL + 2 * gate),
            ("capacity:0.5", USEFUL // 2 + 2 * gate),
        ):
            got = flops[way, str(number)]
            assert got == pytest.approx(want, rel=1e-5)
        dropped = {way: rows[way, str(number)][7] for way in names}
        assert dropped["all_experts"] == "-"
        assert dropped["grouped"] == "0.00%"
        assert float(dropped["capacity:0.5"][:-1]) >= 50
    assert all(cells[8] == "-" for cells in rows.values())
    assert [line.split(":")[0] for line in rest] == [
        "grouped, 2 experts", "capacity", "grouped, 4 experts", "capacity",
        "memory", "2 experts", "4 experts",
    ]  # fmt: skip


@pytest.mark.slow
def test_compiled_by_xla_in_bfloat16():
    setting, rows, rest = printed(
        "--experts=2", "--layers=grouped,capacity:1.0", "--jit_compile",
        "--dtype_policy=mixed_bfloat16", "--calls=2", "--activation=silu",
        "--gating=softmax_top_k",
    )  # fmt: skip
    assert "mixed_bfloat16, jit_compile=True" in setting[0]
    assert setting[1].endswith(
        "softmax_top_k, silu; medians of 3 samples, calls a sample: 2"
    )
    assert list(rows) == [
        ("dense", "-"), ("grouped", "2"), ("capacity:1.0", "2"),
    ]  # fmt: skip
    assert_consistent(rows)
    assert [line.split(":")[0] for line in rest] == ["memory", "2 experts"]


@pytest.mark.slow
def test_memory_is_measured_when_asked():
    _, rows, _ = printed("--experts=2", "--layers=grouped", "--memory")
    assert list(rows) == [("dense", "-"), ("grouped", "2")]
    assert all(int(cells[8]) > 0 for cells in rows.values())


@pytest.mark.slow
def test_all_experts_are_skipped_with_a_reason_where_they_are_too_large():
    # Hidden and output of 32 tokens x 8 experts, twice: 48 KiB.
    _, rows, rest = printed(
        "--experts=8", "--layers=grouped,all_experts", "--all_experts_gib=4e-5"
    )
    assert list(rows) == [("dense", "-"), ("grouped", "8")]
    assert rest[0] == (
        "all_experts, 8 experts, skipped: its activations alone take "
        "4.58e-05 GiB, more than --all_experts_gib=4e-05"
    )
    assert not any("times as fast" in line for line in rest)


@pytest.mark.thorough
def test_a_number_of_experts_below_k_is_refused():
    # As users start it; the others are forks that have imported TensorFlow.
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "moe_tf_trainers.benchmark",
            "--experts=8,2",
            "--k=4",
        ],
        cwd=process.ROOT,
        capture_output=True,
        timeout=300,
        text=True,
    )
    assert result.returncode != 0
    assert "`k` must be between 1" in result.stderr
    assert "Received: k=4, num_experts=2" in result.stderr
    assert not result.stdout


REFUSED = {
    "--activation=siluu": "activation",
    "--experts=": "there must be one, and none twice",
    "--experts=8,8": "there must be one, and none twice",
    "--experts=8,some": "whole numbers of at least 1",
    "--experts=0": "whole numbers of at least 1",
    "--layers=": "there must be one, and none twice",
    "--layers=dense": "dense is always there",
    "--layers=sparse": "`layers` are dense, all_experts, grouped",
    "--layers=capacity:-1": "`capacity_factor` must be finite and above 0",
    "--layers=capacity:1,capacity:1.0": "there must be one, and none twice",
    "--tokens=0": "--tokens=0",
    "--k=0": "--k=0",
    "--calls=0": "--calls=0",
    "--repeats=2": "--repeats=2",
    "--all_experts_gib=-1": "--all_experts_gib=-1",
    "--dtype_policy=float16": "should be one of",
}


def refusals(arguments):
    """What each flag by itself is refused with."""
    # Here, since this process may not have its flags.
    from moe_tf_trainers import benchmark

    told, own = [], flags.FLAGS.flags_by_module_dict()[benchmark.__name__]
    for argument in arguments:
        try:
            flags.FLAGS(["benchmark", argument])
            told.append("accepted")
        except flags.Error as error:
            told.append(str(error))
        flags.FLAGS.unparse_flags()
        for flag in own:
            flag.unparse()
    return told


def test_bad_flags_are_refused_by_name():
    told = process.run(refusals, list(REFUSED))
    for (flag, want), got in zip(REFUSED.items(), told, strict=True):
        assert want in got, flag


def test_branches_that_do_not_divide_are_refused_before_any_row():
    code, told, error = run(
        *SMALL, "--k=4", "--experts=64,8", "--layers=two_level:16"
    )
    assert code != 0
    assert "branches=16, num_experts=8" in error
    assert not told
