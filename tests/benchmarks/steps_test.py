import itertools

import numpy as np
import pytest
import tensorflow as tf

from moe_tf import layers
from moe_tf.benchmarks import layer_kinds
from moe_tf.benchmarks import steps
from moe_tf.dispatch import capacity
from tests import sets

SETTING = layer_kinds.Setting(tokens=20, width=6, hidden=10, k=2)
NUM_EXPERTS = 5
# Forward, and the gradients of what is multiplied; 2 a multiply-add.
GATE = 3 * 2 * SETTING.tokens * SETTING.width * NUM_EXPERTS


def step(way, **changes):
    setting = layer_kinds.Setting(**{**vars(SETTING), **changes})
    row = layer_kinds.Row(way, None if way == "dense" else NUM_EXPERTS)
    return layer_kinds.train_step(row, setting)


def test_useful_operations_are_those_of_the_rows_times_the_matrices():
    assert SETTING.useful_flops == 3 * (2 * 40 * 6 * 10 + 2 * 40 * 10 * 6)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_operations_of_dense_and_of_all_experts(jit_compile):
    changes = {"jit_compile": jit_compile}
    assert step("dense", **changes).flops() == SETTING.useful_flops
    whole = SETTING.useful_flops * NUM_EXPERTS // SETTING.k
    assert step("all_experts", **changes).flops() == whole + GATE


def test_a_dropless_layer_multiplies_what_the_dense_one_does():
    # Gate and noise are a product each.
    assert step("grouped").flops() == SETTING.useful_flops + 2 * GATE


@pytest.mark.thorough
def test_a_dropless_layer_under_xla_pads_and_the_count_shows_it():
    flops = step("grouped", jit_compile=True).flops()
    assert flops > SETTING.useful_flops + 2 * GATE


@sets.JIT_COMPILE
@pytest.mark.parametrize("factor", [0.5, sets.thorough(1.0), 1.25])
def test_a_layer_with_capacity_multiplies_its_slots(factor, jit_compile):
    got = step(f"capacity:{factor}", jit_compile=jit_compile).flops()
    assignments = SETTING.tokens * SETTING.k
    slots = (
        capacity.expert_capacity(assignments, NUM_EXPERTS, factor) * NUM_EXPERTS
    )
    experts = SETTING.useful_flops * slots // assignments
    assert got == experts + 2 * GATE


@pytest.mark.parametrize(
    "way,jit_compile,dtype_policy",
    sets.split(
        itertools.product(
            ("dense", "all_experts", "grouped", "capacity:1.0"),
            (False, True),
            ("float32", "mixed_bfloat16"),
        ),
        [
            ("dense", False, "mixed_bfloat16"),
            ("all_experts", True, "float32"),
            ("grouped", False, "float32"),
            ("capacity:1.0", False, "mixed_bfloat16"),
        ],
        itertools.product(
            ("grouped", "capacity:1.0", "dense"),
            (True,),
            ("float32",),
        ),
    ),
)
def test_a_step_returns_outputs_and_every_gradient(
    way, jit_compile, dtype_policy
):
    train_step = step(way, jit_compile=jit_compile, dtype_policy=dtype_policy)
    rows = SETTING.tokens * (SETTING.k if way == "dense" else 1)
    weights = train_step.layer.trainable_variables
    y_TD, dx_TD, *gradients = train_step()
    assert y_TD.shape == dx_TD.shape == (rows, SETTING.width)
    want = "bfloat16" if dtype_policy == "mixed_bfloat16" else "float32"
    assert y_TD.dtype == dx_TD.dtype == want
    assert [g.shape for g in gradients] == [w.shape for w in weights]
    for tensor in (y_TD, dx_TD, *gradients):
        assert np.isfinite(tf.cast(tensor, "float32")).all()
        assert np.any(tf.cast(tensor, "float32") != 0)


def test_gradients_are_those_of_the_layer():
    layer = layers.FeedForward((10,))
    y_TD, dx_TD, din_DF, dout_FD = steps.TrainStep(layer, 20, 6)()
    x_TD, dy_TD = (
        steps.normal((20, 6), "float32", seed).numpy() for seed in (1, 2)
    )
    in_DF, out_FD = layer.get_weights()
    h_TF = np.maximum(x_TD @ in_DF, 0)
    dh_TF = (dy_TD @ out_FD.T) * (h_TF > 0)
    for got, want in (
        (y_TD, h_TF @ out_FD),
        (dx_TD, dh_TF @ in_DF.T),
        (din_DF, x_TD.T @ dh_TF),
        (dout_FD, h_TF.T @ dy_TD),
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weight,moves", [(0.1, True), (0.0, False)])
def test_the_layers_losses_are_part_of_the_step(weight, moves):
    # A single expert's weight is 1: nothing but the losses moves the gate.
    layer = layers.SparseMoE(
        4, 8, k=1, importance_weight=weight, load_weight=weight
    )
    _, _, *gradients = steps.TrainStep(layer, 20, 6)()
    (gate_DE,) = (
        gradient
        for variable, gradient in zip(
            layer.trainable_variables, gradients, strict=True
        )
        if variable.path.endswith("gate_kernel")
    )
    assert (np.abs(gate_DE).max() > 1e-5) == moves


@pytest.mark.thorough
def test_what_is_dropped_is_a_fraction_and_unknown_of_a_dense_layer():
    tight, loose, dense = map(step, ("capacity:0.5", "grouped", "dense"))
    for train_step in (tight, loose, dense):
        train_step()
    slots = capacity.expert_capacity(40, NUM_EXPERTS, 0.5) * NUM_EXPERTS
    assert 1 - slots / 40 <= tight.dropped() < 1
    assert loose.dropped() == 0
    assert dense.dropped() is None


def test_the_ceiling_is_one_product():
    (got,) = steps.ceiling(16, "float32")()
    a, b = (steps.normal((16, 16), "float32", seed) for seed in (1, 2))
    np.testing.assert_allclose(got, a.numpy() @ b.numpy(), rtol=1e-4, atol=1e-5)


def test_traffic_reads_two_arrays_and_writes_one():
    move = steps.traffic(4000)
    (first,), (second,) = move(), move()
    np.testing.assert_array_equal(first, [1.0])
    np.testing.assert_array_equal(second, [2.0])
