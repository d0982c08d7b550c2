import itertools
import time

import pytest
import tensorflow as tf

from moe_tf.benchmarks import timing


@pytest.mark.parametrize("calls", [1, 4])
def test_layers_take_turns_and_a_median_is_taken(monkeypatch, calls):
    """On a clock that only the functions move."""
    now, called = [0.0], []

    def taking(name, *seconds):
        seconds = itertools.cycle(seconds)

        def function():
            called.append(name)
            if len(called) > 4:  # past the warm-up
                now[0] += next(seconds)
            return [tf.zeros(3)]

        return function

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    got = timing.medians(
        {
            "a": taking("a", *[1.0] * calls, *[9.0] * calls, *[2.0] * calls),
            "b": taking("b", 5.0),
        },
        repeats=3,
        calls=calls,
    )
    assert got == {"a": 2.0, "b": 5.0}
    turns = [*["a"] * calls, *["b"] * calls] * 3
    assert called == ["a", "a", "b", "b", *turns]
