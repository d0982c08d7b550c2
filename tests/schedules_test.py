import keras
import numpy as np
import pytest

from moe_tf.schedules import WarmupInverseSqrt


def rate(schedule, step):
    return float(schedule(step))


def test_rises_linearly_to_the_peak():
    schedule = WarmupInverseSqrt(peak=0.4, warmup_steps=8)
    got = [rate(schedule, step) for step in range(9)]
    np.testing.assert_allclose(got, 0.05 * np.arange(9), rtol=1e-6)


def test_falls_with_the_root_of_the_step():
    schedule = WarmupInverseSqrt(peak=0.4, warmup_steps=100)
    # Four times the steps, half the rate.
    assert rate(schedule, 400) == pytest.approx(0.2)
    assert rate(schedule, 10_000) == pytest.approx(0.04)


def test_is_continuous_at_the_peak():
    schedule = WarmupInverseSqrt(peak=1.0, warmup_steps=1000)
    before, at, after = (rate(schedule, step) for step in (999, 1000, 1001))
    assert at == 1.0
    assert before == pytest.approx(1.0, abs=2e-3) and before < at
    assert after == pytest.approx(1.0, abs=2e-3) and after < at


def test_first_step_is_finite_without_a_linear_part():
    schedule = WarmupInverseSqrt(peak=0.4, warmup_steps=1)
    assert [rate(schedule, step) for step in (0, 1)] == [0.0, rate(schedule, 1)]
    assert rate(schedule, 1) == pytest.approx(0.4)


def test_stays_at_the_peak_as_in_translation():
    # Appendix E: 2,000 steps up, 8,000 constant, then 1 / sqrt(step).
    schedule = WarmupInverseSqrt(0.4, warmup_steps=2000, constant_steps=8000)
    assert rate(schedule, 1000) == pytest.approx(0.2)
    for step in (2000, 5000, 10_000):
        assert rate(schedule, step) == pytest.approx(0.4)
    assert rate(schedule, 40_000) == pytest.approx(0.2)


def test_drives_an_optimizer_and_survives_its_serialisation():
    optimizer = keras.optimizers.SGD(
        WarmupInverseSqrt(0.5, warmup_steps=1, constant_steps=1)
    )
    optimizer = keras.optimizers.deserialize(
        keras.optimizers.serialize(optimizer)
    )
    weight = keras.Variable(0.0)
    moved = []
    for _ in range(4):
        before = float(weight)
        optimizer.apply([keras.ops.convert_to_tensor(-1.0)], [weight])
        moved.append(float(weight) - before)
    want = [0.0, 0.5, 0.5, 0.5 * np.sqrt(2 / 3)]
    np.testing.assert_allclose(moved, want, rtol=1e-5)


@pytest.mark.parametrize(
    "arguments,field",
    [
        ({"peak": 0.0}, "peak"),
        ({"peak": float("nan")}, "peak"),
        ({"peak": 1.0, "warmup_steps": 0}, "warmup_steps"),
        ({"peak": 1.0, "constant_steps": -1}, "constant_steps"),
    ],
)
def test_refuses(arguments, field):
    with pytest.raises(ValueError, match=f"`{field}` must be"):
        WarmupInverseSqrt(**arguments)
