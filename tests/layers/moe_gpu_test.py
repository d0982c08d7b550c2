"""`SparseMoE` on the kernels for a GPU, which a CPU interprets."""

import numpy as np
import pytest
import tensorflow as tf

import moe_tf
from moe_tf import xla
from moe_tf.experts import gpu
from tests import sets

pytest.importorskip("jax", reason="needs the extra `kernels`")

WIDTH, TOKENS = 64, 192
SETTINGS = {
    "dropless": {"gating": "softmax_top_k", "k": 2},
    "noisy": {"k": 2},
    "capacity": {"gating": "softmax_top_k", "k": 2, "capacity_factor": 0.75},
    "by_value": {
        "gating": "switch",
        "capacity_factor": 0.5,
        "drop_policy": "gate_value",
    },
    "batchwise": {"gating": "batchwise", "k": 1},
    "expert_choice": {"gating": "expert_choice", "k": 2},
}


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(xla, "on_gpu", lambda variable: True)


def layer_of(num_experts=3, dtype="float32", **settings):
    layer = moe_tf.SparseMoE(
        num_experts, 128, dtype=dtype, seed=3, name="moe", **settings
    )
    layer.build((None, WIDTH))
    rng = np.random.default_rng(5)
    for variable in layer.trainable_variables:
        scale = 0.0 if "noise" in variable.name else 0.2
        variable.assign(scale * rng.normal(size=variable.shape))
    return layer


def step_of(layer, jit_compile, training=True):
    @tf.function(jit_compile=jit_compile)
    def step(x_TD, mask_T):
        with tf.GradientTape() as tape:
            tape.watch(x_TD)
            y_TD = layer(x_TD, mask=mask_T, training=training)
            loss = tf.reduce_sum(tf.square(tf.cast(y_TD, "float32")))
            loss += tf.cast(sum(layer.losses), "float32")
        variables = [v.value for v in layer.trainable_variables]
        gradients = tape.gradient(
            loss, [x_TD, *variables], unconnected_gradients="zero"
        )
        vectors = [vector.value for vector in layer.balance.vectors]
        return [y_TD, *map(tf.convert_to_tensor, gradients), *vectors]

    return step


def has_kernels(step, *arguments):
    graph = step.get_concrete_function(*arguments).graph.as_graph_def()
    inner = [node for f in graph.library.function for node in f.node_def]
    return any(n.op == "XlaCallModule" for n in [*graph.node, *inner])


def batch(dtype="float32", masked=True):
    x_TD = np.random.default_rng(0).normal(size=(TOKENS, WIDTH))
    x_TD = tf.cast(x_TD, "bfloat16")  # the same in every dtype
    mask_T = np.arange(TOKENS) % 7 > 0 if masked else np.ones(TOKENS, bool)
    return tf.cast(x_TD, dtype), tf.constant(mask_T)


@pytest.mark.parametrize(
    "name,recompute",
    [
        ("dropless", True),
        sets.thorough("expert_choice", False),
        sets.thorough("by_value", False),
        *(
            sets.slow(name, recompute)
            for name in ("noisy", "capacity", "batchwise")
            for recompute in (False, True)
        ),
        sets.slow("dropless", False),
        sets.slow("expert_choice", True),
        sets.slow("by_value", True),
    ],
)
def test_it_gives_what_tensorflows_products_give(as_on_a_gpu, name, recompute):
    settings = {"recompute": recompute, **SETTINGS[name]}
    arguments = batch()
    # Without noise that XLA would draw otherwise.
    training = name != "noisy"
    seen = []
    for jit_compile in (False, True):
        layer = layer_of(jit_compile=False, **settings)
        step = step_of(layer, jit_compile, training)
        assert has_kernels(step, *arguments) == jit_compile
        seen.append(step(*arguments))
    for want, got in zip(*seen, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    "dtype",
    [sets.thorough("bfloat16"), sets.slow("mixed_bfloat16")],
)
def test_a_program_of_its_own_in_bfloat16(as_on_a_gpu, dtype):
    seen = []
    for policy in ("float32", dtype):
        layer = layer_of(
            dtype=policy, gating="softmax_top_k", k=2, activation="silu"
        )
        arguments = batch(layer.compute_dtype)
        step = step_of(layer, jit_compile=None)
        assert has_kernels(step, *arguments)
        seen.append(step(*arguments))
    for want, got in zip(*seen, strict=True):
        error = np.linalg.norm(tf.cast(got, "float32") - want)
        assert error <= 0.02 * np.linalg.norm(want)


@pytest.mark.thorough
def test_where_the_kernels_are_not_used(as_on_a_gpu, monkeypatch):
    def used(jit_compile=True, tokens=TOKENS, k=2, **settings):
        layer = layer_of(jit_compile=False, k=k, **settings)
        x_TD = tf.ones((tokens, WIDTH), layer.compute_dtype)
        step = step_of(layer, jit_compile)
        return has_kernels(step, x_TD, tf.ones(tokens, "bool"))

    assert used()
    assert not used(jit_compile=False)
    assert not used(dtype="float64")
    assert not used(activation=lambda x: x)
    # Mean loads of 64 and of 63.5 slots.
    assert used(tokens=96)
    assert not used(tokens=95)
    unknown = tf.TensorSpec((None, WIDTH), "float32")
    step = step_of(layer_of(jit_compile=False, k=2), True)
    assert not has_kernels(step, unknown, tf.TensorSpec((None,), "bool"))
    monkeypatch.setattr(gpu, "obstacle", lambda *_: "none today")
    assert not used()


def test_nowhere_but_on_a_gpu():
    step = step_of(layer_of(k=2), jit_compile=True)
    on_gpu = bool(tf.config.list_logical_devices("GPU"))
    assert has_kernels(step, *batch()) == on_gpu
