import time

import pytest

from moe_tf.benchmarks import jobs


def count(number, then):
    for index in range(number):
        yield {"index": index, "share": index / 3}
    if then == "fail":
        raise ValueError("It does not fit.")
    if then == "hang":
        time.sleep(100)


def run(folder, then, seconds=60):
    told = []
    job = jobs.Job("counts", f"{__name__}:count", {"number": 2, "then": then})
    records, error = jobs.run_job(job, folder, seconds, told.append)
    assert records == [{"index": 0, "share": 0.0}, {"index": 1, "share": 1 / 3}]
    assert told[:2] == ["index 0; share 0", "index 1; share 0.3333"]
    return error, told[2:]


@pytest.mark.thorough
def test_a_failure_keeps_what_came_and_says_why(tmp_path):
    error, told = run(tmp_path, "fail")
    assert error == "ended with code 1"
    assert "ValueError: It does not fit." in told[-1]


@pytest.mark.slow
def test_what_hangs_is_ended_and_says_where(tmp_path):
    start = time.monotonic()
    error, told = run(tmp_path, "hang", seconds=30)
    assert error == "took more than 30 s"
    assert time.monotonic() - start < 60
    assert "in count" in told[-1]
