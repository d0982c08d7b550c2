import pathlib
import subprocess
import sys

REPOSITORY = pathlib.Path(__file__).parents[2]


def run(*flags):
    return subprocess.run(
        [sys.executable, "-m", "trainers.benchmark", *flags],
        cwd=REPOSITORY,
        capture_output=True,
        timeout=200,
    )


def test_prints_a_ratio_for_each_number_of_experts():
    result = run(
        "--experts=2,4", "--tokens=32", "--width=8", "--hidden=16", "--k=2"
    )
    assert result.returncode == 0, result.stderr.decode()
    header, dense, *layers = result.stdout.decode().splitlines()
    assert header.split()[-2:] == ["ms", "ratio"]
    assert dense.startswith("dense, 64 rows") and dense.endswith(" 1.00")
    assert [line.split()[1] for line in layers] == ["2", "4"]
    milliseconds = float(dense.split()[-2])
    for line in layers:
        taken, ratio = map(float, line.split()[-2:])
        # What was divided had more digits: 0.05 ms either way, and 0.005.
        assert ratio >= (taken - 0.05) / (milliseconds + 0.05) - 0.006
        assert ratio * (milliseconds - 0.05) <= taken + 0.05 + 0.006 * taken


def test_a_number_of_experts_below_k_is_refused():
    result = run("--experts=2", "--tokens=8", "--width=4", "--hidden=4")
    assert result.returncode != 0
    assert b"`k` must be between" in result.stderr
