import numpy as np
import pytest
import tensorflow as tf

from moe_tf import dispatch
from moe_tf.layers import experts


def test_each_expert_is_initialised_by_its_own_fans():
    # glorot_uniform over (E, D, F) would count E into the fans.
    layer = experts.Experts(64, 40)
    layer.build((None, 20))
    limit = (6 / (20 + 40)) ** 0.5
    for kernel in (layer.in_EDF, layer.out_EFD):
        values = np.asarray(kernel)
        assert np.abs(values).max() <= limit
        deviation_E = values.reshape(64, -1).std(-1)
        np.testing.assert_allclose(deviation_E, limit / 3**0.5, rtol=0.15)
    assert np.abs(values[0] - values[1]).max() > 0.1


@pytest.mark.parametrize("field", ["num_experts", "hidden_units"])
def test_sizes_below_one_are_refused(field):
    sizes = {"num_experts": 2, "hidden_units": 3, field: 0}
    with pytest.raises(ValueError, match=f"`{field}`.*Received: {field}=0"):
        experts.Experts(**sizes)


@pytest.mark.parametrize("num_experts", [4, 32])
def test_work_follows_the_assignments_and_not_the_experts(num_experts):
    rows = []

    def counted(h_SF):
        rows.append(h_SF.shape[0])
        return tf.nn.relu(h_SF)

    layer = experts.Experts(num_experts, 16, activation=counted)
    rng = np.random.default_rng(0)
    expert_TK = np.stack(
        [rng.permutation(num_experts)[:2] for _ in range(64)]
    ).astype("int32")
    plan = dispatch.plan_rows(expert_TK, num_experts)
    layer(dispatch.dispatch(tf.ones((64, 8)), plan), plan)
    assert sum(rows) == 64 * 2
