"""Known defects of other mixture-of-experts code: routing, capacity, state.

One case for each, named by what holds here; the line below the name says
where it does not, or did not, hold. Those of the losses are in
`peers_bugs_losses_test.py`.
"""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf

import moe_tf
from moe_tf.dispatch import capacity
from moe_tf.dispatch import plans
from moe_tf.routing import gating
from tests import every_router
from tests import sets

EVERY = pytest.mark.parametrize(
    "name", sets.split(every_router.SETTINGS, every_router.FEW)
)
NOISY = pytest.mark.parametrize("name", ["noisy_top_k", "hierarchical"])
tokens = every_router.tokens


# What a token is given.


def test_slot_0_of_an_expert_takes_a_token():
    # keras.io Switch example (keras-core PR #573): the cumulative sum counts
    # from 1, so an expert of capacity C takes C - 1 tokens.
    plan = plans.plan_capacity(np.zeros((5, 1), "int32"), 2, slots=3)
    none = 2 * 3
    np.testing.assert_array_equal(plan.slot_TK[:, 0], [0, 1, 2, none, none])
    np.testing.assert_array_equal(plan.assignment_S[:3], [0, 1, 2])


@EVERY
def test_the_gate_is_applied_once(name):
    # keras.io Switch example: the dispatch tensor holds the gate already.
    layer = every_router.layer(name, activation="linear")
    for kernel in layer.experts.trainable_variables:
        kernel.assign(np.broadcast_to(np.eye(6), kernel.shape))
    x_TD = tokens(9)
    weight_TK = np.asarray(layer.router(x_TD).gates.weight_TK)
    want_TD = x_TD * weight_TK.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(layer(x_TD), want_TD, rtol=1e-9, atol=1e-12)


def test_a_gate_value_that_underflows_is_still_an_assignment():
    # tensor2tensor and davidmrau/mixture-of-experts take `gates > 0` for the
    # choice; a softmax that underflows then loses the token.
    gates, _ = gating.noisy_top_k(np.float32([[500.0, 0.0, 200.0]]), k=2)
    np.testing.assert_array_equal(gates.weight_TK, [[1.0, 0.0]])
    np.testing.assert_array_equal(gating.count_assigned(gates, 3), [1, 0, 1])


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_the_router_tells_apart_what_half_precision_cannot(policy):
    # keras-hub routes in the policy's dtype; MaxText does so by default
    # (`float32_gate_logits=False`).
    layer = every_router.layer("softmax_top_k", k=1, dtype=policy)
    logits_E = np.where(np.arange(8) == 5, 1.0001, 1.0)
    layer.router.gate_DE.assign(np.outer(np.eye(6)[0], logits_E))
    layer(tokens(4).astype("float32"))
    assert layer.balance.assigned_E[5] == 4


def test_an_expert_starts_the_same_however_many_there_are():
    # keras `glorot_uniform` of (E, D, F) takes E for a receptive field:
    # weights too small by sqrt(E).
    limit = math.sqrt(6 / (16 + 32))
    for num_experts in (1, 64):
        layer = moe_tf.SparseMoE(num_experts, 32, k=1)
        layer.build((None, 16))
        for kernel in layer.experts.trainable_variables:
            largest = np.abs(kernel).max()
            assert 0.95 * limit < largest <= limit, (num_experts, kernel.name)


@EVERY
def test_a_token_of_zeros_is_a_token(name):
    # Flaxformer takes a token whose entries are all zero for padding.
    layer = every_router.layer(name)
    x_TD = tokens(13)
    x_TD[5] = 0.0
    layer(x_TD, training=True)
    want = 13 * layer.router.experts_per_token
    most = layer.router.max_tokens_per_expert(13, training=True)
    if most is not None:  # experts choose: ceil(2 * 13 / 8), not of 12
        assert most == math.ceil(want / 8)
        want = 8 * most
    assert np.sum(layer.balance.assigned_E) == want


# Capacity.


@pytest.mark.parametrize("factor,kept", [(0.5, 1), (1.0, 2), (1.25, 3)])
def test_the_capacity_that_is_asked_for_is_the_one_used(factor, kept):
    # keras.io Switch example and DeepSpeed #1658: the argument is ignored.
    layer = every_router.layer("switch", capacity_factor=factor)
    every_router.collapse(layer)
    y_TD = np.asarray(layer(tokens(16), training=True))
    answered_T = np.abs(y_TD).max(axis=1) > 0
    np.testing.assert_array_equal(answered_T, np.arange(16) < kept)


@pytest.mark.parametrize(
    "num_assignments,num_experts,factor,slots",
    [(100, 10, 1.25, 13), (100, 10, 1, 10), (8, 8, 1.0, 1), (100, 10, 1.1, 11)],
)
def test_capacity_is_a_multiple_of_the_mean_load(
    num_assignments, num_experts, factor, slots
):
    # megablocks PR #125 (read as a number of tokens), fairseq (a fraction of
    # the tokens), Mesh TensorFlow and Lingvo (at least 4, in fours).
    got = capacity.expert_capacity(num_assignments, num_experts, factor)
    assert got == slots


@EVERY
def test_a_capacity_above_the_number_of_tokens_drops_nothing(name):
    # DeepSpeed PR #8155.
    x_TD = tokens(9)
    outputs = [
        every_router.layer(name, quiet=True, capacity_factor=factor)(
            x_TD, training=True
        )
        for factor in (None, 1000.0)
    ]
    np.testing.assert_allclose(outputs[1], outputs[0], rtol=1e-9, atol=1e-12)


def test_the_capacity_after_rounding_is_reported():
    # Elsewhere it can only be computed by hand; vmoe alone warns of it.
    layer = every_router.layer("softmax_top_k", capacity_factor=1.0)
    layer(tokens(10), training=True)  # ceil(2 * 10 / 8) = 3, not 2.5
    got = layer.balance.latest()["effective_capacity_factor"]
    assert float(got) == pytest.approx(3 / 2.5)


@pytest.mark.parametrize("name", ["noisy_top_k", "hierarchical", "switch"])
def test_dropped_assignments_are_counted(name):
    # MaxText, FastMoE, transformers' Switch and lucidrains report nothing.
    layer = every_router.layer(name, quiet=True, capacity_factor=0.5)
    x_TD = tokens(16)
    gates = layer.router(x_TD, training=True).gates
    assigned_E = np.bincount(np.ravel(gates.expert_TK), minlength=8)
    slots = math.ceil(0.5 * assigned_E.sum() / 8)
    dropped_E = np.maximum(assigned_E - slots, 0)
    layer(x_TD, training=True)
    np.testing.assert_array_equal(layer.balance.dropped_E, dropped_E)
    got = layer.balance.latest()["dropped_fraction"]
    assert float(got) == pytest.approx(dropped_E.sum() / assigned_E.sum())
    assert dropped_E.any()


@EVERY
def test_capacity_and_routing_are_those_of_the_whole_batch(name):
    # tensor2tensor's `local_moe_tpu` (capacity of a sequence), Mesh
    # TensorFlow, Flax, Tutel #250 (of a group or of a device's samples).
    x_BLD = tokens(4, 4)
    outputs = [
        every_router.layer(name, quiet=True, capacity_factor=0.5)(
            x, training=True
        )
        for x in (x_BLD, x_BLD.reshape(16, 6))
    ]
    np.testing.assert_array_equal(np.reshape(outputs[0], (16, 6)), outputs[1])


def test_xla_drops_nothing_when_all_choose_one_expert():
    # MaxText truncates where `ragged_buffer_factor` is above 0.
    layer = every_router.layer("switch")
    every_router.collapse(layer)
    x_TD = tokens(32)
    compiled = tf.function(layer, jit_compile=True)
    np.testing.assert_allclose(compiled(x_TD), layer(x_TD), rtol=1e-9)
    assert layer.balance.assigned_E[0] == 32


# Evaluation and serving.


@EVERY
def test_evaluation_draws_nothing_and_adds_no_loss(name):
    # DeepSpeed PR #8620 (the second expert is sampled), tensor2tensor
    # (`local_moe` called with train=True always), MoCE-IR #19.
    layer = every_router.layer(name)
    states = [np.array(v) for v in layer.non_trainable_variables]
    first_TD, second_TD = layer(tokens(9)), layer(tokens(9))
    np.testing.assert_array_equal(first_TD, second_TD)
    for variable, state in zip(
        layer.non_trainable_variables, states, strict=True
    ):
        np.testing.assert_array_equal(variable, state)
    assert layer.losses == []


@NOISY
def test_training_does_draw_noise(name):
    # keras-hub's Mixtral: `router_jitter_noise` above 0 raises
    # AttributeError, `ops.random` does not exist.
    layer = every_router.layer(name)
    first_TD, second_TD = (layer(tokens(9), training=True) for _ in range(2))
    assert np.abs(first_TD - second_TD).max() > 1e-3


@pytest.mark.parametrize(
    "name",
    sets.split(
        [name for name in every_router.SETTINGS if name != "expert_choice"],
        every_router.FEW,
    ),
)
def test_a_token_is_evaluated_as_if_it_were_alone(name):
    # marin #8134: capacity clipped at evaluation; vmoe #6. Expert choice
    # cannot, and its docstring says so.
    layer = every_router.layer(name, capacity_factor=0.25)
    x_TD = tokens(12)
    alone_TD = np.concatenate([layer(x_TD[t : t + 1]) for t in range(12)])
    np.testing.assert_allclose(layer(x_TD), alone_TD, rtol=1e-9, atol=1e-12)
    assert np.sum(layer.balance.dropped_E) == 0


def test_any_number_of_tokens_goes_through_one_graph():
    # DeepSpeed #6809: inference with drop_tokens=False fails on shapes.
    layer = every_router.layer("hierarchical")
    signature = [tf.TensorSpec((None, 6), tf.float64)]
    run = tf.function(layer, input_signature=signature)
    for number in (0, 1, 7):
        x_TD = tokens(number)
        np.testing.assert_allclose(run(x_TD), layer(x_TD), rtol=1e-9)


@pytest.mark.thorough
@pytest.mark.parametrize("capacity_factor", [sets.slow(None), 0.25])
def test_an_export_serves_experts_that_no_example_used(
    capacity_factor, tmp_path
):
    # YOLO-Master PR #74, wenet PR #2726: experts that are not active in the
    # traced batch are left out. MoCE-IR #19: is the noise off? marin #8134:
    # capacity clips what is served.
    layer = moe_tf.SparseMoE(
        4, 5, k=1, capacity_factor=capacity_factor, name="moe"
    )
    model = keras.Sequential([keras.Input((4,)), layer])
    layer.router.gate_DE.assign(9.0 * np.eye(4))
    layer.router.noise_DE.assign(np.full((4, 4), 99.0))
    model.predict(np.eye(4)[:1], verbose=0)
    np.testing.assert_array_equal(layer.balance.assigned_E, [1, 0, 0, 0])
    model.export(tmp_path / "model", verbose=False)
    served = tf.saved_model.load(tmp_path / "model")
    # Expert t answers token t.
    hidden_EF = np.maximum(np.einsum("EEF->EF", layer.experts.in_EDF), 0)
    answer_ED = np.einsum("EF,EFD->ED", hidden_EF, layer.experts.out_EFD)
    for expert_T in ([0, 1, 2, 3], [3, 3, 3, 3, 3, 1, 3], [2]):
        x_TD = np.eye(4, dtype="float32")[expert_T]
        for _ in range(2):
            got_TD = served.serve(x_TD)
            np.testing.assert_allclose(got_TD, answer_ED[expert_T], atol=1e-6)


# Files.


@EVERY
def test_a_file_holds_every_expert_and_the_whole_router(name, tmp_path):
    # DeepSpeed #6589, KempnerForge #202 (some experts only), Megatron-LM PR
    # #5845 (dropped), NeMo Automodel PR #2682 (left at random),
    # PaddleFormers #4391 and FlagScale #412 (the router's bias).
    layer = every_router.layer(name, dtype="float32")
    model = keras.Sequential([keras.Input((6,)), layer])
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign(rng.normal(size=variable.shape))
    x_TD = np.repeat(tokens(1), 3, axis=0)  # for few of the experts
    model.predict(x_TD, verbose=0)
    model.save(tmp_path / "model.keras")
    keras.utils.set_random_seed(2)
    loaded = keras.models.load_model(tmp_path / "model.keras")
    wanted = {v.path: np.asarray(v) for v in model.trainable_variables}
    got = {v.path: np.asarray(v) for v in loaded.trainable_variables}
    assert got.keys() == wanted.keys()
    assert sum("expert" in path for path in got) == 2
    for path, want in wanted.items():
        np.testing.assert_array_equal(got[path], want, path)


# Cost.


@pytest.mark.parametrize("k", [1, 2, 8])
def test_experts_compute_k_rows_for_each_token(k):
    # keras-hub (Mixtral, Qwen) computes all experts for all tokens.
    rows = []

    def spy(hidden):
        rows.append(math.prod(hidden.shape[:-1]))
        return hidden

    layer = every_router.layer("softmax_top_k", k=k, activation=spy)
    layer(tokens(16))
    assert sum(rows) == 16 * k


def test_an_expert_without_tokens_gets_a_gradient_of_zero():
    # As in tensor2tensor, an expert's batch may be empty.
    layer = every_router.layer("noisy_top_k")
    every_router.collapse(layer)
    x_TD = tokens(9)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.square(layer(x_TD, training=True)))
    kernels = [kernel.value for kernel in layer.experts.trainable_variables]
    for gradient in tape.gradient(loss, kernels):
        used_E = np.abs(gradient).max(axis=(1, 2)) > 0
        np.testing.assert_array_equal(used_E, np.arange(8) < 2)


# Reports.


def test_the_numbers_show_in_the_logs_of_fit():
    # tensorflow/models reports through `add_metric`, gone in Keras 3 (keras
    # #20127, #20391); FastMoE's updater is an empty stub.
    layer = every_router.layer("switch", dtype="float32", capacity_factor=0.5)
    every_router.collapse(layer)
    model = keras.Sequential([layer])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    logs = model.fit(tokens(16), tokens(16), batch_size=16, verbose=0).history
    assert logs["moe_max_over_mean_load"] == pytest.approx([8.0])
    assert logs["moe_dropped_fraction"] == pytest.approx([15 / 16])
    assert logs["moe_load_loss"] == pytest.approx([7.0], rel=1e-2)


@pytest.mark.thorough
def test_the_number_of_logs_and_tags_is_that_of_two_experts(tmp_path):
    # Mesh TensorFlow (a scalar for each expert of each layer), trl #4611,
    # tensorboard #5959 (a slow board).
    seen = []
    for num_experts in (2, 32):
        layer = moe_tf.SparseMoE(num_experts, 3, k=1, name="moe")
        model = keras.Sequential([keras.Input((6,)), layer])
        model.compile("sgd", "mse", jit_compile=False)
        folder = tmp_path / str(num_experts)
        board = moe_tf.LoadBalanceBoard(folder, update_freq=1)
        logs = model.fit(
            tokens(8), tokens(8), callbacks=[board], verbose=0
        ).history
        (file,) = (folder / "train").iterdir()
        tags = {
            value.tag
            for event in tf.compat.v1.train.summary_iterator(str(file))
            for value in event.summary.value
        }
        seen.append((set(logs), tags))
    assert seen[0] == seen[1]
    assert 0 < len(seen[0][1]) < 20
