"""Known defects of other mixture-of-experts code: losses, padding, gradients.

One case for each, named by what holds here; the line below the name says
where it does not, or did not, hold. What a router must learn from is checked
by its gradient, not by the value of a loss.
"""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import moe_tf
from moe_tf import layers
from moe_tf import losses
from moe_tf.routing import gating
from tests import every_router
from tests import sets
from tests.reference import moe as reference

EVERY = pytest.mark.parametrize(
    "name", sets.split(every_router.SETTINGS, every_router.FEW)
)
NOISY = pytest.mark.parametrize("name", ["noisy_top_k", "hierarchical"])
WITH_LOAD_LOSS = ["noisy_top_k", "hierarchical", "softmax_top_k", "switch"]
tokens = every_router.tokens


def gradients(layer, x_TD, variables, task=0.0, **kwargs):
    """Gradients of the layer's losses and of `task` times its outputs."""
    with tf.GradientTape() as tape:
        y_TD = layer(x_TD, training=True, **kwargs)
        loss = sum(layer.losses) + task * tf.reduce_sum(tf.square(y_TD))
    return tape.gradient(loss, [variable.value for variable in variables])


# Values.


@EVERY
@pytest.mark.parametrize("weight", [sets.thorough(0.0), 0.3])
def test_a_loss_is_added_once_and_times_its_weight(name, weight):
    # keras.io Switch example (no weight), tensor2tensor's `local_moe` until
    # July 2019 (weight applied twice), JetMoE (z-loss fixed at 0.1).
    layer = every_router.layer(name, importance_weight=weight)
    layer(tokens(9), training=True)
    numbers = layer.balance.latest()
    importance = reference.cv_squared(np.asarray(layer.balance.importance_E))
    assert float(numbers["importance_loss"]) == pytest.approx(importance)
    weights = {**layer.router.loss_weights, "importance_loss": weight}
    wanted = [w * float(numbers[loss]) for loss, w in weights.items() if w]
    got = [float(loss) for loss in layer.losses]
    assert sorted(got) == pytest.approx(sorted(wanted), rel=1e-5)


@EVERY
def test_balance_losses_are_0_at_perfect_balance(name):
    # 1 in GShard and keras-hub, k in transformers and MaxText, 1/W^2 in
    # FastMoE; OLMoE #46 asks what the minimum is.
    layer = every_router.layer(name, quiet=True)
    layer(every_router.spread(layer), training=True)
    for loss in ("importance_loss", "load_loss"):
        assert abs(float(layer.balance.latest()[loss])) < 1e-6
    each = layer.router.experts_per_token
    np.testing.assert_array_equal(layer.balance.assigned_E, np.full(8, each))


def test_balance_losses_are_n_minus_1_at_collapse():
    # One scale for all, as their common minimum.
    load_E = np.float32([6.0, 0.0, 0.0, 0.0])
    probability_TE = np.float32([[1.0, 0.0, 0.0, 0.0]] * 6)
    assert float(losses.cv_squared(load_E)) == pytest.approx(3.0)
    assert float(
        losses.load_balance_loss(probability_TE, load_E)
    ) == pytest.approx(3.0)


def test_the_load_threshold_is_a_noisy_logit():
    # davidmrau #32: it is taken after a softmax, and compared with logits.
    rng = np.random.default_rng(0)
    clean_1E, std_1E, draw_1E = rng.normal(size=(3, 1, 5))
    std_1E = np.abs(std_1E) + 0.5
    _, chance_1E = gating.noisy_top_k(clean_1E, 2, std_1E, draw_1E)
    for expert in range(5):
        noisy_NE = np.repeat(clean_1E + std_1E * draw_1E, 20_000, axis=0)
        again_N = std_1E[0, expert] * rng.normal(size=20_000)
        noisy_NE[:, expert] = clean_1E[0, expert] + again_N
        rank_N = (noisy_NE > noisy_NE[:, expert, None]).sum(axis=1)
        want = (rank_N < 2).mean()
        assert float(chance_1E[0, expert]) == pytest.approx(want, abs=0.02)
    _, moved_1E = gating.noisy_top_k(clean_1E + 7.0, 2, std_1E, draw_1E)
    np.testing.assert_allclose(moved_1E, chance_1E, rtol=1e-9)


@NOISY
def test_the_load_loss_is_finite_without_noise_or_tokens(name):
    # davidmrau #9: NaN, a division by zero, at evaluation.
    layer = every_router.layer(name)
    for variable in layer.router.trainable_variables:
        if "noise" in variable.name:  # a deviation of exactly 0
            value = np.zeros(variable.shape)
            value[..., 0, :] = -1e4
            variable.assign(value)
    for kwargs in ({}, {"training": True}):
        for mask_T in (None, np.zeros(9, bool)):
            layer(tokens(9), mask=mask_T, **kwargs)
            assert np.isfinite(layer.balance.latest()["load_loss"])
    for gradient in gradients(layer, tokens(9), layer.trainable_variables):
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    "router", [layers.SwitchRouter, layers.NoisyTopKRouter]
)
def test_the_loss_is_that_of_the_whole_batch(router):
    # tensor2tensor's `local_moe` (of each shard), FastMoE (of each worker's
    # experts): halves that are unbalanced alone balance each other.
    layer = router(2, k=1, importance_weight=1.0, load_weight=1.0)
    x_TD = np.float32([[9.0, 0.0, 1.0]] * 4 + [[0.0, 9.0, 1.0]] * 4)
    layer.build(x_TD.shape)
    layer.gate_DE.assign(np.eye(3)[:, :2])
    if router is layers.NoisyTopKRouter:
        layer.noise_DE[2].assign([-99.0, -99.0])
    whole, *halves = (
        float(sum(layer(part, training=True).losses.values()))
        for part in (x_TD, x_TD[:4], x_TD[4:])
    )
    assert halves == pytest.approx([2.0, 2.0], abs=1e-2)
    assert whole == pytest.approx(0.0, abs=1e-2)


@EVERY
def test_twice_the_tokens_have_the_same_loss(name):
    # NeMo Automodel #1408: the scale depends on how a batch is divided.
    layer = every_router.layer(name, quiet=True)
    both = []
    for times in (1, 2):
        layer(np.repeat(tokens(16), times, axis=0), training=True)
        numbers = layer.balance.latest()
        both.append([numbers["importance_loss"], numbers["load_loss"]])
    np.testing.assert_allclose(*both, rtol=1e-5, atol=1e-6)


def test_two_layers_with_opposite_collapse_are_both_unbalanced():
    # transformers pools the layers: these two look perfect.
    both = [
        moe_tf.SparseMoE(2, 3, k=1, gating="switch", load_weight=1.0, name=name)
        for name in ("first", "second")
    ]
    model = keras.Sequential([keras.Input((1,)), *both])
    for layer, sign in zip(both, (1.0, -1.0), strict=True):
        layer.router.gate_DE.assign(sign * np.float32([[50.0, -50.0]]))
        for kernel in layer.experts.trainable_variables:
            kernel.assign(np.ones(kernel.shape))
    model(np.ones((4, 1)), training=True)
    np.testing.assert_array_equal(both[0].balance.assigned_E, [4, 0])
    np.testing.assert_array_equal(both[1].balance.assigned_E, [0, 4])
    assert [float(loss) for loss in model.losses] == pytest.approx([1.0, 1.0])
    for layer in both:
        assert float(layer.balance.latest()["max_over_mean_load"]) == 2.0


# Padding.


@EVERY
@pytest.mark.parametrize("padding", [sets.thorough(1), 40])
def test_padding_takes_no_slot_and_enters_no_loss(name, padding):
    # Megatron-LM #1984, marin #8953 (padding fills experts), DeepSpeed
    # (`used_token` for k = 1 only), Tutel, FastMoE, MegaBlocks (no mask).
    layer = every_router.layer(name, quiet=True, capacity_factor=0.75)
    x_TD = tokens(9)
    padded_TD = np.concatenate([x_TD, np.full((padding, 6), np.nan)])
    seen = []
    for x, mask_T in ((x_TD, None), (padded_TD, np.arange(9 + padding) < 9)):
        y_TD = layer(x, mask=mask_T, training=True)
        losses = [float(loss) for loss in layer.losses]
        vectors = [np.array(vector) for vector in layer.balance.vectors]
        slopes = gradients(
            layer, x, layer.trainable_variables, task=1.0, mask=mask_T
        )
        seen.append([y_TD[:9], losses, *vectors, *slopes])
        np.testing.assert_array_equal(y_TD[9:], 0.0)
    for want, got in zip(*seen, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


def test_masked_tokens_leave_the_mean_before_it_is_taken():
    # Mesh TensorFlow's Switch loss: masked after the mean.
    logits_TE = tokens(9)
    probability_TE = np.exp(logits_TE) / np.exp(logits_TE).sum(
        -1, keepdims=True
    )
    load_E = np.arange(6.0)
    mask_T = np.arange(9) < 5
    got = losses.load_balance_loss(probability_TE, load_E, mask_T)
    np.testing.assert_allclose(
        got, losses.load_balance_loss(probability_TE[:5], load_E)
    )
    got = losses.z_loss(logits_TE, mask_T)
    np.testing.assert_allclose(got, losses.z_loss(logits_TE[:5]))


@pytest.mark.parametrize(
    "name",
    [name for name in every_router.SETTINGS if "hierarchical" not in name],
)
def test_the_z_loss_works_by_itself(name):
    # Mesh TensorFlow: it crashes if `importance` or `num_microbatches` is
    # None, that is, without padding.
    layer = every_router.layer(name, z_loss_weight=0.5, importance_weight=0.0)
    x_TD = tokens(9)
    logits_TE = x_TD @ np.asarray(layer.router.gate_DE)
    want = (np.log(np.exp(logits_TE).sum(axis=1)) ** 2).mean()
    for mask_T in (None, np.ones(9, bool)):
        layer(x_TD, mask=mask_T, training=True)
        got = layer.balance.latest()["z_loss"]
        assert float(got) == pytest.approx(want, rel=1e-5)
        assert any(abs(float(v) - 0.5 * want) < 1e-9 for v in layer.losses)


# Gradients.


@pytest.mark.parametrize(
    "name,loss",
    [
        *((name, "importance") for name in every_router.SETTINGS),
        *((name, "load") for name in WITH_LOAD_LOSS),
    ],
)
def test_each_balance_loss_moves_the_router(name, loss):
    # transformers #28255, #31464 and others, NeMo Automodel #1408: constant,
    # or without a gradient. fastmoe #176: where is it in a loop of my own?
    layer = every_router.layer(name)
    for weight in layer.router.loss_weights:
        layer.router.loss_weights[weight] = float(weight == f"{loss}_loss")
    gates = [v for v in layer.router.trainable_variables if "kernel" in v.name]
    slopes = gradients(layer, tokens(9), gates)
    assert max(np.abs(slope).max() for slope in slopes) > 1e-3


def test_the_task_moves_a_switch_router():
    # A gate normalised after the selection is 1 when k = 1.
    slopes = []
    for name in ("switch", "softmax_top_k"):
        layer = every_router.layer(name, k=1, load_weight=1e-30)
        gate = [layer.router.gate_DE]
        slopes.append(np.abs(gradients(layer, tokens(9), gate, 1.0)[0]).max())
    assert slopes[0] > 1e-2
    assert slopes[1] < 1e-12


@EVERY
def test_recomputation_keeps_gradients_and_number_of_losses(name):
    # Keras's `RematScope` (the gradient of `add_loss` is zero, and its list
    # grows in the backward pass), Megatron-LM #1514 (counted twice),
    # torchtitan PR #3000.
    seen = []
    for recompute in (False, True):
        layer = every_router.layer(
            name, quiet=True, recompute=recompute, importance_weight=0.5
        )
        x_TD = keras.Variable(tokens(9), dtype="float64")
        slopes = gradients(
            layer, x_TD.value, [x_TD, *layer.trainable_variables], task=1.0
        )
        (alone,) = gradients(
            layer, tokens(9), layer.router.trainable_variables[:1]
        )
        assert np.abs(alone).max() > 1e-4
        number = sum(
            weight > 0 for weight in layer.router.loss_weights.values()
        )
        assert len(layer.losses) == number  # after the backward pass
        seen.append([*slopes, alone, sum(layer.losses)])
    for want, got in zip(*seen, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.thorough
def test_a_functional_model_recomputes():
    # keras #21207: such a model raises under `RematScope`.
    layer = moe_tf.SparseMoE(4, 5, k=2, recompute=True)
    inputs = keras.Input((6,))
    model = keras.Model(inputs, layer(inputs))
    model.compile("adam", "mse")
    before = [np.array(v) for v in model.trainable_variables]
    model.fit(tokens(8), tokens(8), verbose=0)
    for old, variable in zip(before, model.trainable_variables, strict=True):
        assert np.abs(variable - old).max() > 0, variable.path


@pytest.mark.thorough
def test_accumulation_takes_the_mean_of_the_balance_gradients():
    # torchtitan #4772, NeMo Automodel #1408: lost, or of another scale.
    x_BTD = tokens(2, 8)
    layer = every_router.layer(
        "softmax_top_k", dtype="float32", load_weight=3.0
    )
    gate = layer.router.gate_DE
    slopes = [gradients(layer, x_TD, [gate])[0] for x_TD in x_BTD]
    want_DE = gate - 0.5 * (slopes[0] + slopes[1]) / 2
    assert np.abs(want_DE - gate).max() > 1e-2
    model = keras.Sequential([layer])
    model.compile(
        keras.optimizers.SGD(0.5, gradient_accumulation_steps=2),
        loss=lambda _, y: 0.0 * y,  # the balance alone
        jit_compile=False,
    )
    x_TD = x_BTD.reshape(16, 6)
    model.fit(x_TD, x_TD, batch_size=8, shuffle=False, verbose=0)
    np.testing.assert_allclose(gate, want_DE, rtol=1e-4, atol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["noisy_top_k", sets.slow("hierarchical")])
def test_loss_scaling_gives_the_router_the_gradient_of_float32(name):
    # The balance loss is to be scaled and unscaled as the task's is.
    x_TD = np.round(8 * tokens(16)) / 8  # exact in float16
    moved = []
    for policy in ("float32", "mixed_float16"):
        layer = every_router.layer(name, dtype=policy)
        start = [np.array(v) for v in layer.router.trainable_variables]
        optimizer = keras.optimizers.SGD(0.1)
        if policy == "mixed_float16":
            optimizer = keras.optimizers.LossScaleOptimizer(
                optimizer, initial_scale=256.0
            )
        model = keras.Sequential([layer])
        model.compile(optimizer, loss=lambda _, y: 0.0 * y, jit_compile=False)
        model.fit(x_TD, x_TD, batch_size=16, verbose=0)
        moved.append(
            [
                np.asarray(variable) - old
                for variable, old in zip(
                    layer.router.trainable_variables, start, strict=True
                )
            ]
        )
    for want, got in zip(*moved, strict=True):
        assert np.abs(want).max() > 1e-4
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-6)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["noisy_top_k", "hierarchical"])
def test_the_default_losses_undo_a_collapse(name):
    # torchtitan #1246.
    layer = every_router.layer(name)
    for variable in layer.router.trainable_variables:
        value = np.zeros(variable.shape)
        if "gate" in variable.name:
            value[..., 0, 0] = 3.0
        variable.assign(value)
    optimizer = keras.optimizers.SGD(1.0)

    @tf.function
    def step():
        variables = layer.router.trainable_variables
        slopes = gradients(layer, tokens(64), variables)
        optimizer.apply(slopes, variables)
        return layer.balance.latest()["cv_load"]

    unevenness = [float(step()) for _ in range(120)]
    assert unevenness[0] > 0.5
    assert unevenness[-1] < unevenness[0] / 2


# Replicas: another process, since devices are fixed at the first operation.
_REPLICAS = """
import keras, numpy as np, tensorflow as tf
from tests import every_router
tf.config.threading.set_intra_op_parallelism_threads(1)
cpu, = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(
    cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
x_TD = np.concatenate([every_router.tokens(8)] * 2)
one = tf.distribute.get_strategy()
two = tf.distribute.MirroredStrategy(
    ["CPU:0", "CPU:1"], tf.distribute.ReductionToOneDevice())
gates = []
for strategy in one, two:
    with strategy.scope():
        layer = every_router.layer(
            "softmax_top_k", dtype="float32", load_weight=3.0)
        start_DE = np.array(layer.router.gate_DE)
        model = keras.Sequential([layer])
        model.compile(keras.optimizers.SGD(0.5), loss=lambda _, y: 0.0 * y,
                      jit_compile=False)
    model.fit(x_TD, x_TD, batch_size=16, shuffle=False, verbose=0)
    gates.append(np.array(layer.router.gate_DE.value))
assert np.abs(gates[0] - start_DE).max() > 1e-2
np.testing.assert_allclose(gates[1], gates[0], atol=1e-6)
print(two.num_replicas_in_sync, "replicas agree")
"""


@pytest.mark.thorough
def test_two_replicas_of_one_batch_have_the_loss_of_one():
    # FastMoE (1/W^2 for W workers), keras #20609 and #19891. With different
    # data each replica balances its own.
    done = subprocess.run(
        [sys.executable, "-c", _REPLICAS],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "2 replicas agree" in done.stdout, done.stderr
