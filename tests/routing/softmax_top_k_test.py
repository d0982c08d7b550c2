"""Softmax top-k and Switch gating, and the losses that routers share."""

import numpy as np
import pytest
import tensorflow as tf

from moe_tf import losses
from moe_tf.layers import moe
from moe_tf.routing import softmax_top_k
from tests import finite_differences
from tests import keras_contract
from tests import sets
from tests.reference import batchwise
from tests.reference import moe as reference


class RouterTest(keras_contract.TestCase):
    def test_contract(self):
        for cls, k in (
            (softmax_top_k.SoftmaxTopKRouter, 2),
            (softmax_top_k.SwitchRouter, 1),
        ):
            self.run_layer_test(
                cls,
                init_kwargs={
                    "num_experts": 4,
                    "k": k,
                    "importance_weight": 0.1,
                    "z_loss_weight": 0.2,
                },
                input_shape=(6, 8),
                expected_num_trainable_weights=1,
                expected_num_losses=0,
                supports_masking=True,
                run_training_check=False,
                run_mixed_precision_check=False,  # float32 by design
                call_kwargs={"training": True},
            )


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def layer_of(name, num_experts=5, k=2, width=6, **kwargs):
    k = None if name == "switch" else k
    kwargs = {"dtype": "float64", **kwargs}
    layer = moe.SparseMoE(num_experts, 7, k=k, gating=name, **kwargs)
    layer.build((None, width))
    layer.router.gate_DE.assign(draw(5, width, num_experts))
    return layer


def oracle(layer, x_TD, mask_T=None):
    """`(gate_TE, probability_TE)`: gates of eqs. 2-5, full softmax."""
    probability_TE = batchwise.scores(x_TD, np.asarray(layer.router.gate_DE))
    gate_TE = np.zeros_like(probability_TE)
    for t, share_E in enumerate(probability_TE):
        if mask_T is not None and not mask_T[t]:
            continue
        gate_TE[t] = reference.gates_of_token(np.log(share_E), layer.k)
        if isinstance(layer.router, softmax_top_k.SwitchRouter):
            gate_TE[t] *= share_E[np.argmax(share_E)]
    return gate_TE, probability_TE


def excess(gate_TE, probability_TE, real_T):
    """`n sum f P - 1` as in Switch, equations 4-6, over the real tokens."""
    chosen_TE = gate_TE[real_T] > 0
    fraction_E = chosen_TE.sum(0) / chosen_TE.sum()
    return gate_TE.shape[1] * fraction_E @ probability_TE[real_T].mean(0) - 1.0


CASES = [
    ("softmax_top_k", 5, 2),
    ("softmax_top_k", 4, 4),
    ("softmax_top_k", 3, 1),
    ("switch", 5, 1),
    ("switch", 1, 1),
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name,num_experts,k", CASES)
def test_matches_the_numpy_oracle(name, num_experts, k, masked):
    layer = layer_of(
        name, num_experts, k, importance_weight=0.3, load_weight=0.7
    )
    x_TD = draw(0, 11, 6)
    real_T = np.arange(11) % 3 > 0 if masked else np.ones(11, bool)
    mask_T = real_T if masked else None
    gate_TE, probability_TE = oracle(layer, x_TD, mask_T)
    kernels = (
        np.asarray(layer.experts.in_EDF),
        np.asarray(layer.experts.out_EFD),
    )
    want_TD = batchwise.mixture(x_TD, gate_TE, *kernels)
    for training in (False, True):
        y_TD = layer(x_TD, mask=mask_T, training=training)
        np.testing.assert_allclose(y_TD, want_TD, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(
        layer.balance.assigned_E, (gate_TE > 0).sum(0)
    )
    want = [
        0.3 * reference.cv_squared(gate_TE.sum(0)),
        0.7 * excess(gate_TE, probability_TE, real_T),
    ]
    np.testing.assert_allclose(layer.losses, want, rtol=1e-7, atol=1e-9)
    latest = layer.balance.latest()
    assert float(latest["load_loss"]) == pytest.approx(want[1] / 0.7, abs=1e-6)


@sets.JIT_COMPILE_SLOW
@pytest.mark.parametrize(
    "name,num_experts,k,masked",
    [
        ("softmax_top_k", 5, 2, True),
        ("softmax_top_k", 3, 3, False),
        ("switch", 5, 1, True),
    ],
)
def test_gradients_match_finite_differences(
    name, num_experts, k, masked, jit_compile
):
    layer = layer_of(
        name,
        num_experts,
        k,
        importance_weight=0.3,
        load_weight=0.7,
        z_loss_weight=0.5,
    )
    mask_T = np.arange(8) % 3 > 0 if masked else None
    finite_differences.check(layer, draw(0, 8, 6), mask_T, jit_compile)


@pytest.mark.parametrize("name", ["noisy_top_k", "softmax_top_k"])
def test_top_k_trains_by_comparing_each_expert_with_the_mixture(name):
    # dL/dH_i = G_i <dL/dy, E_i(x) - y> for the chosen i, 0 for the others
    # (what back-propagation through equations 1-5 comes to). Without noise,
    # dL/dW_g = x^T dL/dH.
    layer = layer_of(name, num_experts=5, k=3)
    x_TD, dy_TD = draw(0, 9, 6), draw(1, 9, 6)
    with tf.GradientTape() as tape:
        y_TD = layer(x_TD)
        loss = tf.reduce_sum(y_TD * dy_TD)
    got_DE = tape.gradient(loss, layer.router.gate_DE.value)
    gate_TE, _ = oracle(layer, x_TD)
    in_EDF, out_EFD = map(np.asarray, layer.experts.trainable_variables)
    dlogits_TE = np.zeros((9, 5))
    for t, i in zip(*np.nonzero(gate_TE), strict=True):
        answer_D = reference.expert(x_TD[t], in_EDF[i], out_EFD[i])
        dlogits_TE[t, i] = (
            gate_TE[t, i] * dy_TD[t] @ (answer_D - y_TD[t].numpy())
        )
    assert (np.count_nonzero(dlogits_TE, axis=1) == 3).all()
    np.testing.assert_allclose(got_DE, x_TD.T @ dlogits_TE, rtol=1e-8)


@pytest.mark.parametrize("name,moves", [("switch", 1), ("softmax_top_k", 0)])
def test_the_task_moves_the_router_with_one_expert(name, moves):
    layer = layer_of(name, k=1, load_weight=0.0)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.square(layer(draw(0, 9, 6), training=True)))
    assert not layer.losses
    gradient = tape.gradient(loss, layer.router.gate_DE.value)
    size = np.abs(tf.convert_to_tensor(gradient)).max()
    assert size > 1e-2 if moves else size < 1e-12


def test_switch_takes_one_expert_only():
    with pytest.raises(ValueError, match="`k` must be 1 .*Received: k=2"):
        softmax_top_k.SwitchRouter(4, k=2)
    with pytest.raises(ValueError, match="Received: k=2"):
        moe.SparseMoE(4, 5, k=2, gating="switch")


@pytest.mark.parametrize("name", ["softmax_top_k", "switch"])
def test_the_load_loss_is_0_at_balance_and_most_at_collapse(name):
    # Tokens that are scaled unit vectors, token t choosing expert t mod n:
    # equal f and, by symmetry, equal P. The same logits for all: collapse.
    num_experts = 4
    layer = layer_of(name, num_experts, k=1, width=4, load_weight=1.0)
    layer.router.gate_DE.assign(50.0 * np.eye(4))
    balanced_TD = np.eye(4)[np.arange(12) % 4]
    layer(balanced_TD, training=True)
    assert float(layer.losses[0]) == pytest.approx(0.0, abs=1e-9)
    layer(np.eye(4)[np.full(12, 2)], training=True)
    assert float(layer.losses[0]) == pytest.approx(num_experts - 1, abs=1e-9)
    # Masked tokens do not count: without them the rest is balanced.
    x_TD = np.concatenate([balanced_TD, np.eye(4)[np.full(7, 2)]])
    layer(x_TD, mask=np.arange(19) < 12, training=True)
    assert float(layer.losses[0]) == pytest.approx(0.0, abs=1e-9)


def test_the_kernel_starts_small_but_apart():
    layer = softmax_top_k.SoftmaxTopKRouter(64, k=2)
    layer.build((None, 100))
    gate_DE = np.asarray(layer.gate_DE)
    # Variance 0.1 / 100; its estimate from 6,400 draws is off by sqrt(2 / N),
    # 2 %, and the truncation is corrected for by Keras.
    assert gate_DE.var() == pytest.approx(1e-3, rel=0.1)
    routing = layer(draw(0, 2000, 100).astype("float32"))
    share_E = np.asarray(routing.load_E) / 2000
    assert share_E.min() > 0.2 * share_E.mean()


@pytest.mark.parametrize(
    "name",
    [
        "noisy_top_k",
        *map(sets.thorough, ("softmax_top_k", "switch")),
        "batchwise",
    ],
)
@sets.JIT_COMPILE
def test_the_z_loss_reaches_the_router_from_real_tokens_alone(
    name, jit_compile
):
    settings = {"z_loss_weight": 0.5, "importance_weight": 0.0}
    if name != "batchwise":  # whose threshold loss comes last
        settings["load_weight"] = 0.0
    layer = layer_of(name, **settings)
    x_TD, real_T = draw(0, 10, 6), np.arange(10) % 4 > 0
    gate = layer.router.gate_DE.value

    @tf.function(jit_compile=jit_compile)
    def step(x_TD):
        with tf.GradientTape() as tape:
            layer(x_TD, mask=real_T, training=True)
            loss = layer.losses[0]
        return loss, tape.gradient(loss, gate), len(layer.losses)

    broken_TD = np.where(real_T[:, None], x_TD, np.nan)
    loss, gradient_DE, number = step(tf.constant(broken_TD))
    assert number == (2 if name == "batchwise" else 1)
    logits_TE = x_TD[real_T] @ gate.numpy()
    log_T = np.log(np.exp(logits_TE).sum(-1))
    assert float(loss) == pytest.approx(0.5 * np.mean(log_T**2), rel=1e-9)
    assert float(layer.balance.latest()["z_loss"]) == pytest.approx(
        np.mean(log_T**2), rel=1e-6
    )
    probability_TE = np.exp(logits_TE - log_T[:, None])
    want_DE = x_TD[real_T].T @ (log_T[:, None] * probability_TE) / real_T.sum()
    np.testing.assert_allclose(gradient_DE, want_DE, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("weight", [None, 0.0])
def test_without_a_z_loss_nothing_is_added_or_reported(weight):
    layer = layer_of("softmax_top_k", z_loss_weight=weight)
    layer(draw(0, 5, 6), training=True)
    assert len(layer.losses) == 1
    assert "z_loss" not in layer.balance.latest()


def test_a_batch_without_a_real_token_has_zero_losses():
    layer = layer_of("softmax_top_k", z_loss_weight=0.3, importance_weight=0.1)
    layer(draw(0, 5, 6), mask=np.zeros(5, bool), training=True)
    np.testing.assert_array_equal(layer.losses, [0.0, 0.0, 0.0])


def test_the_load_loss_reports_but_does_not_add_without_training():
    layer = layer_of("switch")
    x_TD = draw(0, 9, 6)
    layer(x_TD)
    assert not layer.losses
    gate_TE, probability_TE = oracle(layer, x_TD)
    want = excess(gate_TE, probability_TE, np.ones(9, bool))
    assert float(layer.balance.latest()["load_loss"]) == pytest.approx(want)


def test_the_selection_is_not_part_of_the_load_gradient():
    # d/dP of n sum f P: the counts f are constants of the batch.
    probability_TE = tf.constant([[0.7, 0.3], [0.6, 0.4], [0.2, 0.8]])
    load_E = tf.constant([2.0, 1.0])
    with tf.GradientTape() as tape:
        tape.watch([probability_TE, load_E])
        loss = losses.load_balance_loss(probability_TE, load_E)
    gradients = tape.gradient(loss, [probability_TE, load_E])
    want_TE = np.tile([2 * (2 / 3) / 3, 2 * (1 / 3) / 3], (3, 1))
    np.testing.assert_allclose(gradients[0], want_TE, rtol=1e-6)
    assert gradients[1] is None or not np.any(gradients[1])
