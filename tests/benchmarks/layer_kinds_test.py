import numpy as np
import pytest

from moe_tf import layers
from moe_tf.benchmarks import layer_kinds

SETTING = layer_kinds.Setting(tokens=20, width=6, hidden=10, k=2)


def test_every_expert_on_every_token_gives_what_the_sparse_layer_gives():
    whole = layer_kinds.make_layer(layer_kinds.Row("all_experts", 5), SETTING)
    sparse = layer_kinds.make_layer(layer_kinds.Row("grouped", 5), SETTING)
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


def test_rows_are_dense_once_then_each_kind_with_each_number():
    got = layer_kinds.table_rows(["grouped", "capacity:1.0"], [8, 32])
    assert got == [
        layer_kinds.Row("dense"),
        layer_kinds.Row("grouped", 8),
        layer_kinds.Row("capacity:1.0", 8),
        layer_kinds.Row("grouped", 32),
        layer_kinds.Row("capacity:1.0", 32),
    ]


def test_capacity_reaches_the_layer():
    layer = layer_kinds.make_layer(layer_kinds.Row("capacity:1.25", 5), SETTING)
    assert isinstance(layer, layers.SparseMoE)
    assert layer.capacity_factor == 1.25
    assert (
        layer_kinds.make_layer(
            layer_kinds.Row("grouped", 5), SETTING
        ).capacity_factor
        is None
    )


def test_two_levels_have_the_root_of_k_at_each_level():
    setting = layer_kinds.Setting(tokens=20, width=6, hidden=10, k=4)
    layer = layer_kinds.make_layer(layer_kinds.Row("two_level:3", 12), setting)
    assert (layer.router.branching, layer.k) == ((3, 4), 2)
    for branches, k in ((5, 4), (3, 2)):
        setting = layer_kinds.Setting(tokens=20, width=6, hidden=10, k=k)
        with pytest.raises(ValueError, match=f"branches={branches},.*k={k}"):
            layer_kinds.make_layer(
                layer_kinds.Row(f"two_level:{branches}", 12), setting
            )


@pytest.mark.parametrize(
    "kind,message",
    [
        ("sparse", "`layers` are dense, all_experts, grouped, capacity:FACTOR"),
        ("grouped:2", "`layers` are"),
        ("two_level:2.5", "`layers` are"),
        ("two_level:0", "`branches` must be .* at least 1"),
        ("1.25", "`layers` are"),
        ("capacity:", "`layers` are"),
        ("capacity:much", "Received: capacity:much"),
        ("capacity:0", "`capacity_factor` must be finite and above 0"),
        ("capacity:inf", "`capacity_factor` must be finite and above 0"),
    ],
)
def test_an_unknown_kind_is_refused(kind, message):
    with pytest.raises(ValueError, match=message):
        layer_kinds.parse_kind(kind)


def test_memory_of_all_experts_follows_the_compute_dtype():
    got = layer_kinds.all_experts_bytes(5, SETTING)
    assert got == 20 * 5 * 2 * (10 + 6) * 4
    half = layer_kinds.Setting(20, 6, 10, 2, dtype_policy="mixed_bfloat16")
    assert layer_kinds.all_experts_bytes(5, half) == got // 2
