"""Groups of tokens on one device: each is a batch by itself."""

import typing

import numpy as np
import pytest
import tensorflow as tf

from moe_tf.dispatch import plans
from moe_tf.routing import gating
from tests import every_router
from tests import sets

EVERY = pytest.mark.parametrize(
    "name", sets.split(every_router.SETTINGS, every_router.FEW)
)


@pytest.mark.parametrize("by_value", [False, True])
@pytest.mark.parametrize("slots", [1, 3, 20])
def test_a_plan_is_that_of_each_group(slots, by_value):
    rng = np.random.default_rng(slots)
    expert_GTK = np.argsort(rng.random((3, 10, 5)), -1)[..., :2].astype("int32")
    expert_GTK[1, :4] = 5  # masked
    weight_GTK = rng.random((3, 10, 2))
    limit_G = np.minimum([slots, 2, 1], slots).astype("int32")
    priority = weight_GTK if by_value else None
    plan = plans.plan_groups(expert_GTK, 5, slots, limit_G, priority)
    x_GTD, y_GSD = (
        rng.normal(size=(3, 10, 4)),
        rng.normal(size=(3, 5 * slots, 4)),
    )
    dispatched = plan.dispatch(x_GTD)
    combined = plan.combine(y_GSD, weight_GTK)
    dropped_E = 0
    for g in range(3):
        one = plans.plan_capacity(
            expert_GTK[g],
            5,
            slots,
            limit_G[g],
            weight_GTK[g] if by_value else None,
        )
        np.testing.assert_array_equal(plan.assignment_S[g], one.assignment_S)
        np.testing.assert_array_equal(plan.slot_TK[g], one.slot_TK)
        np.testing.assert_array_equal(dispatched[g], one.dispatch(x_GTD[g]))
        np.testing.assert_allclose(
            combined[g], one.combine(y_GSD[g], weight_GTK[g])
        )
        dropped_E += one.dropped_E()
    np.testing.assert_array_equal(plan.dropped_E(), dropped_E)
    assert float(plan.effective_capacity_factor()) == pytest.approx(
        limit_G.sum() * 5 / np.sum(expert_GTK < 5)
    )


class Results(typing.NamedTuple):
    """What a layer gives for some tokens, and the gradients of its outputs."""

    outputs: np.ndarray
    dinputs: np.ndarray
    dvariables: list
    assigned: np.ndarray
    dropped: np.ndarray


def run_layer(name, x_TD, mask_T, **settings):
    layer = every_router.layer(name, quiet=True, **settings)
    with tf.GradientTape() as tape:
        tape.watch(x_TD)
        y_TD = layer(x_TD, mask=mask_T, training=True)
        loss = tf.reduce_sum(tf.sin(y_TD))  # the losses are of the batch
    variables = [v.value for v in layer.trainable_variables]
    dx_TD, *gradients = tape.gradient(
        loss, [x_TD, *variables], unconnected_gradients="zero"
    )
    return Results(
        y_TD.numpy(),
        dx_TD.numpy(),
        [tf.convert_to_tensor(gradient).numpy() for gradient in gradients],
        np.array(layer.balance.assigned_E),
        np.array(layer.balance.dropped_E),
    )


@EVERY
@pytest.mark.parametrize("capacity_factor", [sets.thorough(None), 0.75])
def test_a_layer_routes_each_group_by_itself(name, capacity_factor):
    x_TD = tf.constant(every_router.tokens(24))
    mask_T = tf.constant(np.arange(24) % 7 > 0)
    settings = {"capacity_factor": capacity_factor}
    got = run_layer(name, x_TD, mask_T, num_groups=3, **settings)
    parts = [
        run_layer(name, x_TD[i : i + 8], mask_T[i : i + 8], **settings)
        for i in (0, 8, 16)
    ]
    close = {"rtol": 1e-9, "atol": 1e-12}
    for field in ("outputs", "dinputs"):
        want = np.concatenate([getattr(part, field) for part in parts])
        np.testing.assert_allclose(getattr(got, field), want, **close)
    wants = zip(*(part.dvariables for part in parts), strict=True)
    for gradient, want in zip(got.dvariables, wants, strict=True):
        np.testing.assert_allclose(gradient, sum(want), **close)
    for field in ("assigned", "dropped"):
        want = sum(getattr(part, field) for part in parts)
        np.testing.assert_array_equal(getattr(got, field), want)


@EVERY
@sets.JIT_COMPILE
def test_groups_that_do_not_divide_are_filled_with_masked_tokens(
    name, jit_compile
):
    layer = every_router.layer(
        name, quiet=True, capacity_factor=1.0, num_groups=4
    )
    call = tf.function(
        lambda x_TD, mask_T: layer(x_TD, mask=mask_T, training=True),
        jit_compile=jit_compile,
    )
    x_TD = every_router.tokens(24)
    mask_T = np.arange(24) < 21
    whole_TD = call(x_TD, mask_T)
    dropped_E = np.array(layer.balance.dropped_E)
    cut_TD = layer(x_TD[:21], training=True)
    assert cut_TD.shape == (21, every_router.WIDTH)
    np.testing.assert_allclose(cut_TD, whole_TD[:21], rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(layer.balance.dropped_E, dropped_E)


def test_an_experts_choice_in_groups_is_that_in_each():
    rng = np.random.default_rng(0)
    score_GTE = rng.integers(0, 4, (3, 9, 5)).astype("float32")  # with ties
    score_GTE[0, 2] = np.nan
    mask_GT = rng.random((3, 9)) < 0.8
    number_G = np.array([0, 2, 4], "int32")
    got = gating.batchwise_mask_in_groups(score_GTE, number_G, mask_GT)
    for g in range(3):
        want = gating.batchwise_mask(
            score_GTE[g], number_G[g], int(number_G[g]), mask_GT[g]
        )
        np.testing.assert_array_equal(got[g], want)


@pytest.mark.parametrize("value", [0, 1.5, "two"])
def test_a_bad_number_of_groups_is_refused(value):
    with pytest.raises(ValueError, match=f"`num_groups`.*={value}"):
        every_router.layer("noisy_top_k", num_groups=value)
