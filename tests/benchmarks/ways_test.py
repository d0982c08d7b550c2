import numpy as np
import pytest

from moe_tf import layers
from moe_tf.benchmarks import ways

SETTING = ways.Setting(tokens=20, width=6, hidden=10, k=2)


def test_every_expert_on_every_token_gives_what_the_sparse_layer_gives():
    whole = ways.layer(ways.Row("all_experts", 5), SETTING)
    sparse = ways.layer(ways.Row("grouped", 5), SETTING)
    rng = np.random.default_rng(3)
    for layer in (whole, sparse):
        layer.build((20, 6))
    gate, inner, outer = (rng.normal(size=w.shape) for w in whole.weights)
    whole.set_weights([gate, inner, outer])
    by_name = {
        variable.path.split("/")[-1]: variable
        for variable in sparse.trainable_variables
    }
    by_name["gate_kernel"].assign(gate)
    by_name["expert_in_kernel"].assign(inner)
    by_name["expert_out_kernel"].assign(outer)
    x_TD = rng.normal(size=(20, 6)).astype("float32")
    # No noise outside training.
    np.testing.assert_allclose(whole(x_TD), sparse(x_TD), rtol=1e-4, atol=1e-4)


def test_rows_are_dense_once_then_each_way_with_each_number():
    got = ways.rows(["grouped", "capacity:1.0"], [8, 32])
    assert got == [
        ways.Row("dense"),
        ways.Row("grouped", 8),
        ways.Row("capacity:1.0", 8),
        ways.Row("grouped", 32),
        ways.Row("capacity:1.0", 32),
    ]


def test_capacity_reaches_the_layer():
    layer = ways.layer(ways.Row("capacity:1.25", 5), SETTING)
    assert isinstance(layer, layers.SparseMoE)
    assert layer.capacity_factor == 1.25
    assert ways.layer(ways.Row("grouped", 5), SETTING).capacity_factor is None


def test_groups_have_the_root_of_k_at_each_level():
    setting = ways.Setting(tokens=20, width=6, hidden=10, k=4)
    layer = ways.layer(ways.Row("groups:3", 12), setting)
    assert (layer.router.branching, layer.k) == ((3, 4), 2)
    for groups, k in ((5, 4), (3, 2)):
        setting = ways.Setting(tokens=20, width=6, hidden=10, k=k)
        with pytest.raises(ValueError, match=f"groups={groups},.*k={k}"):
            ways.layer(ways.Row(f"groups:{groups}", 12), setting)


@pytest.mark.parametrize(
    "way,message",
    [
        ("sparse", "`ways` are dense, all_experts, grouped, capacity:FACTOR"),
        ("grouped:2", "`ways` are"),
        ("groups:2.5", "`ways` are"),
        ("groups:0", "`groups` must be .* at least 1"),
        ("1.25", "`ways` are"),
        ("capacity:", "`ways` are"),
        ("capacity:much", "Received: capacity:much"),
        ("capacity:0", "`capacity_factor` must be finite and above 0"),
        ("capacity:inf", "`capacity_factor` must be finite and above 0"),
    ],
)
def test_an_unknown_way_is_refused(way, message):
    with pytest.raises(ValueError, match=message):
        ways.parse(way)


def test_memory_of_all_experts_follows_the_compute_dtype():
    got = ways.all_experts_bytes(5, SETTING)
    assert got == 20 * 5 * 2 * (10 + 6) * 4
    half = ways.Setting(20, 6, 10, 2, dtype_policy="mixed_bfloat16")
    assert ways.all_experts_bytes(5, half) == got // 2
