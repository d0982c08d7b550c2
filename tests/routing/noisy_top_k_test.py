import keras
import numpy as np
import pytest

from moe_tf.routing import noisy_top_k as router
from tests import keras_contract
from tests.reference import moe as reference


class RouterTest(keras_contract.TestCase):
    def test_contract(self):
        self.run_layer_test(
            router.NoisyTopKRouter,
            init_kwargs={"num_experts": 4, "k": 2, "seed": 1},
            input_shape=(6, 8),
            expected_num_trainable_weights=2,
            expected_num_non_trainable_variables=1,  # the seed
            expected_num_seed_generators=1,
            expected_num_losses=0,
            supports_masking=True,
            run_training_check=False,
            run_mixed_precision_check=False,  # float32 by design
            call_kwargs={"training": True},
        )


@pytest.mark.parametrize(
    "field,kwargs",
    [
        ("k", {"num_experts": 4, "k": 5}),
        ("k", {"num_experts": 4, "k": 0}),
        ("k", {"num_experts": 4, "k": 2.0}),
        ("num_experts", {"num_experts": 4.0}),
        ("importance_weight", {"num_experts": 4, "importance_weight": -0.1}),
        ("load_weight", {"num_experts": 4, "load_weight": float("nan")}),
        ("load_weight", {"num_experts": 4, "load_weight": float("inf")}),
    ],
)
def test_bad_arguments_name_the_field(field, kwargs):
    with pytest.raises(ValueError, match=f"`{field}`.*Received: {field}="):
        router.NoisyTopKRouter(**kwargs)


def test_starts_balanced_with_noise_of_deviation_ln_2():
    layer = router.NoisyTopKRouter(8, k=2, seed=0)
    x_TD = np.random.default_rng(0).normal(size=(4000, 5)).astype("float32")
    routing = layer(x_TD, training=True)
    assert not np.any(layer.gate_DE) and not np.any(layer.noise_DE)
    # Each expert is chosen by about 4000 * 2 / 8 tokens: noise alone decides.
    share_E = np.bincount(np.ravel(routing.gates.expert_TK)) / 4000
    np.testing.assert_allclose(share_E, 0.25, atol=0.04)
    # With equal clean logits the load of every expert is alike.
    assert np.std(routing.load_E) / np.mean(routing.load_E) < 0.05


@pytest.mark.parametrize("k", [1, 2, 6])
def test_losses_are_the_papers(k):
    layer = router.NoisyTopKRouter(
        6, k=k, importance_weight=0.3, load_weight=0.7, seed=3
    )
    rng = np.random.default_rng(0)
    x_TD = rng.normal(size=(20, 5)).astype("float32")
    layer.build(x_TD.shape)
    layer.gate_DE.assign(rng.normal(size=(5, 6)))
    layer.noise_DE.assign(rng.normal(size=(5, 6)))
    seed = keras.random.SeedGenerator(3)
    seed.state.assign(layer.seed_generator.state)
    routing = layer(x_TD, training=True)
    draw_TE = np.asarray(keras.random.normal((20, 6), seed=seed), "float64")
    weights = np.zeros((6, 5, 1)), np.zeros((6, 1, 5))
    _, importance_E, load_E = reference.moe(
        x_TD.astype("float64"),
        np.asarray(layer.gate_DE, "float64"),
        np.asarray(layer.noise_DE, "float64"),
        *weights,
        draw_TE,
        k,
    )
    np.testing.assert_allclose(routing.importance_E, importance_E, rtol=1e-4)
    np.testing.assert_allclose(routing.load_E, load_E, rtol=1e-4)
    want = [
        0.3 * reference.cv_squared(importance_E),
        0.7 * reference.cv_squared(load_E),
    ]
    losses = layer.weighted(routing.losses)
    np.testing.assert_allclose(losses, want, rtol=1e-4, atol=1e-7)


def test_noise_only_in_training():
    layer = router.NoisyTopKRouter(4, k=2, seed=0)
    x_TD = np.random.default_rng(0).normal(size=(9, 5)).astype("float32")
    layer.build(x_TD.shape)
    layer.gate_DE.assign(np.random.default_rng(1).normal(size=(5, 4)))
    first, second = layer(x_TD), layer(x_TD)
    np.testing.assert_array_equal(first.gates.weight_TK, second.gates.weight_TK)
    noisy = [layer(x_TD, training=True).gates.weight_TK for _ in range(2)]
    assert np.abs(noisy[0] - noisy[1]).max() > 0
    # Without noise the load is the count.
    np.testing.assert_array_equal(
        first.load_E, np.bincount(np.ravel(first.gates.expert_TK), minlength=4)
    )


def test_a_weight_of_zero_turns_a_loss_off():
    x_TD = np.ones((3, 5), "float32")
    layer = router.NoisyTopKRouter(4, k=2, importance_weight=0.0, seed=0)
    routing = layer(x_TD, training=True)
    (loss,) = layer.weighted(routing.losses)
    assert loss == 0.1 * routing.losses["load_loss"]
