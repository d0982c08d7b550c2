import numpy as np
import pytest
import tensorflow as tf

from moe_tf.training import averaging
from moe_tf.training import checkpoints


def make(value):
    return {
        "model/kernel": tf.Variable([value, 2.0 * value]),
        "model/half": tf.Variable([value], dtype=tf.bfloat16),
        "model/seed": tf.Variable([int(value)], dtype=tf.int64),
        "optimizer/momentum": tf.Variable([value]),
    }


def saved(folder, values, keep=10):
    """Checkpoints of steps 1, 2, ... with these values."""
    for step, value in enumerate(values, start=1):
        opened = checkpoints.Checkpoints(folder / "last", make(value), keep)
        opened.save(step)
    variables = make(0.0)
    return (
        checkpoints.Checkpoints(folder / "last", variables, keep),
        checkpoints.Checkpoints(folder / "average", variables, keep=1),
        variables,
    )


def test_weights_are_means_and_the_rest_is_the_latest(tmp_path):
    last, average, variables = saved(tmp_path, [1.0, 3.0, 8.0])
    assert averaging.average_checkpoints(last, average, variables) == [1, 2, 3]
    for held in (variables, None):
        if held is None:  # as another process reads it
            held = make(0.0)
            opened = checkpoints.Checkpoints(tmp_path / "average", held)
            found = opened.restore_latest()
            assert found == {"step": 3, "averaged_steps": [1, 2, 3]}
        np.testing.assert_allclose(held["model/kernel"], [4.0, 8.0])
        np.testing.assert_allclose(
            tf.cast(held["model/half"], tf.float32), [4.0]
        )
        np.testing.assert_array_equal(held["model/seed"], [8])
        np.testing.assert_array_equal(held["optimizer/momentum"], [8.0])


def test_only_the_states_that_were_kept_count(tmp_path):
    last, average, variables = saved(tmp_path, [100.0, 1.0, 3.0], keep=2)
    assert averaging.average_checkpoints(last, average, variables) == [2, 3]
    np.testing.assert_allclose(variables["model/kernel"], [2.0, 4.0])


def test_averaging_again_replaces_the_mean(tmp_path):
    last, average, variables = saved(tmp_path, [1.0, 3.0])
    averaging.average_checkpoints(last, average, variables)
    averaging.average_checkpoints(last, average, variables)
    np.testing.assert_allclose(variables["model/kernel"], [2.0, 4.0])
    assert average.steps() == [2]


def test_refuses_where_there_is_nothing_or_damage(tmp_path):
    last, average, variables = saved(tmp_path, [])
    with pytest.raises(ValueError, match="no checkpoint to average"):
        averaging.average_checkpoints(last, average, variables)
    last, average, variables = saved(tmp_path, [1.0, 3.0])
    (data,) = tmp_path.glob("last/step-00000001/variables.data*")
    data.write_bytes(b"")
    with pytest.raises(checkpoints.DamagedCheckpointError, match="00000001"):
        averaging.average_checkpoints(last, average, variables)
    assert average.steps() == []
