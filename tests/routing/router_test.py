"""The interface of all routers, and what every gating must do."""

import doctest
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

import moe_tf
from moe_tf.layers import moe
from moe_tf.routing import batchwise
from moe_tf.routing import gating
from moe_tf.routing import router
from moe_tf.routing import softmax_top_k
from tests import keras_contract
from tests import sets

# Each gating with the number of losses it adds and of weights it has.
GATINGS = [
    ("noisy_top_k", 2, 2),
    ("softmax_top_k", 1, 1),
    ("switch", 1, 1),
    ("batchwise", 2, 2),
    ("expert_choice", 0, 1),
]
NAMES = [name for name, *_ in GATINGS]


@keras.saving.register_keras_serializable(package="moe_tf_tests")
class CosineRouter(router.Router):
    """A user's own: experts by cosine similarity, with a loss of its own."""

    def __init__(self, num_experts, k, spread_weight=0.0, **kwargs):
        super().__init__(num_experts, k, **kwargs)
        self.spread_weight = spread_weight
        self.loss_weights["spread_loss"] = spread_weight

    def build(self, input_shape):
        self.code_ED = self.add_weight(
            shape=(self.num_experts, input_shape[-1]), name="codes"
        )
        self.built = True

    def call(self, inputs, mask=None, training=False):
        code_ED = ops.normalize(self.code_ED, axis=-1)
        logits_TE = ops.matmul(inputs, ops.transpose(code_ED))
        gates, _ = gating.noisy_top_k(logits_TE, self.k)
        spread = ops.sum(ops.square(ops.sum(self.code_ED, axis=0)))
        return self.routing(gates, mask, spread_loss=spread)

    def get_config(self):
        return {**super().get_config(), "spread_weight": self.spread_weight}


class SparseMoETest(keras_contract.TestCase):
    @pytest.mark.thorough
    def test_contract_with_every_gating(self):
        for name, num_losses, num_weights in GATINGS:
            with self.subTest(name):
                self.run_layer_test(
                    moe.SparseMoE,
                    init_kwargs={
                        "num_experts": 4,
                        "hidden_units": 6,
                        "k": 1 if name == "switch" else 2,
                        "gating": name,
                    },
                    input_shape=(2, 3, 8),
                    expected_output_shape=(2, 3, 8),
                    expected_num_trainable_weights=num_weights + 2,
                    expected_num_non_trainable_weights=0,
                    expected_num_seed_generators=int(name == "noisy_top_k"),
                    expected_num_losses=num_losses,
                    supports_masking=True,
                    call_kwargs={"training": True},
                )


def tokens(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def layer_of(name, num_experts=4, k=2, width=6, **kwargs):
    """A layer whose gate tells tokens apart."""
    kwargs = {"seed": 0, "dtype": "float64", **kwargs}
    if isinstance(name, router.Router):
        del kwargs["seed"]
    elif name != "switch":
        kwargs["k"] = k
    layer = moe.SparseMoE(num_experts, 7, gating=name, **kwargs)
    layer.build((None, width))
    layer.router.gate_DE.assign(tokens(width, num_experts, seed=5))
    return layer


def test_the_example_of_the_docstring_routes_as_it_says():
    examples = doctest.DocTestParser().get_examples(router.Router.__doc__)
    names = {"moe_tf": moe_tf, "np": np, "ops": ops}
    for example in examples[:-1]:  # The last one calls the layer.
        exec(example.source, names)
    x_TD = tokens(9, 6)
    y_TD = names["layer"](x_TD, mask=np.arange(9) < 7)
    np.testing.assert_array_equal(
        names["layer"].balance.assigned_E,
        [(x_TD[:7, 0] <= 0).sum(), (x_TD[:7, 0] > 0).sum()],
    )
    assert np.abs(y_TD[:7]).max(axis=1).all() and not np.any(y_TD[7:])


class ArgmaxRouter(router.GateRouter):
    """A user's own, with the int64 that `tf.argmax` gives."""

    def call(self, inputs, mask=None, training=False):
        logits_TE = self.logits(inputs)
        expert_TK = tf.argmax(logits_TE, axis=-1)[:, None]
        weight_TK = ops.ones_like(logits_TE[:, :1])
        return self.routing(gating.Gates(weight_TK, expert_TK), mask)


@sets.JIT_COMPILE
@pytest.mark.parametrize("capacity_factor", [None, 3.0])
def test_experts_of_int64_are_taken(capacity_factor, jit_compile):
    layer = layer_of(ArgmaxRouter(4, 1), capacity_factor=capacity_factor)
    train = compiled(layer, True, jit_compile)
    train(tokens(9, 6))
    logits_TE = tokens(9, 6) @ np.asarray(layer.router.gate_DE)
    want_E = np.bincount(logits_TE.argmax(-1), minlength=4)
    np.testing.assert_array_equal(layer.balance.assigned_E, want_E)


def model_with(own_router):
    layer = moe.SparseMoE(3, 5, gating=own_router, name="moe")
    embedding = keras.layers.Embedding(9, 6, mask_zero=True)
    return keras.Sequential([embedding, layer])


def test_a_router_of_the_users_own_trains_masks_and_logs():
    model = model_with(CosineRouter(3, k=2, spread_weight=0.5))
    ids_BL = np.array([[1, 2, 3, 0], [4, 5, 0, 0], [6, 0, 0, 0]])
    target_BLD = np.zeros((3, 4, 6))
    model.compile(keras.optimizers.SGD(0.05), "mse", jit_compile=False)
    model.build(ids_BL.shape)
    layer = model.get_layer("moe")
    code_ED = np.array(layer.router.code_ED)
    history = model.fit(
        ids_BL, target_BLD, batch_size=3, epochs=20, verbose=0
    ).history
    spread = history["moe_spread_loss"]
    assert spread[0] == pytest.approx(np.square(code_ED.sum(0)).sum(), rel=1e-5)
    assert 0 <= spread[-1] < 0.1 * spread[0]
    for name in ("importance_loss", "load_loss", "cv_load"):
        assert len(history[f"moe_{name}"]) == 20
    # Six words, two experts each; padding goes nowhere and gives zeros.
    assert np.sum(layer.balance.assigned_E) == 12
    np.testing.assert_array_equal(np.asarray(model(ids_BL))[ids_BL == 0], 0.0)
    model(ids_BL, training=True)
    (loss,) = layer.losses
    code_ED = np.asarray(layer.router.code_ED)
    assert float(loss) == pytest.approx(
        0.5 * np.square(code_ED.sum(0)).sum(), rel=1e-5
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: CosineRouter(3, k=2, spread_weight=0.25),
        sets.slow(
            lambda: softmax_top_k.SoftmaxTopKRouter(3, k=2, load_weight=0.5)
        ),
        sets.thorough(
            lambda: batchwise.BatchwiseRouter(3, threshold_weight=0.5, k=2)
        ),
    ],
)
def test_a_model_with_a_router_instance_comes_back_from_its_file(
    make, tmp_path
):
    model = model_with(make())
    ids_BL = np.array([[1, 2, 3, 0], [4, 5, 0, 0]])
    model.compile("sgd", "mse", jit_compile=False)
    model.fit(ids_BL, np.ones((2, 4, 6)), verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(ids_BL), model(ids_BL))
    layers = [m.get_layer("moe") for m in (model, loaded)]
    configs = [layer.router.get_config() for layer in layers]
    assert configs[0] == configs[1]
    assert type(layers[0].router) is type(layers[1].router)
    assert len(layers[0].weights) == len(layers[1].weights)


def test_a_router_that_is_built_already_keeps_its_weights():
    own = softmax_top_k.SoftmaxTopKRouter(4, k=2)
    own(tokens(3, 6))
    gate_DE = np.array(own.gate_DE)
    layer = moe.SparseMoE(4, 5, gating=own)
    layer(tokens(3, 6))
    assert layer.router is own
    np.testing.assert_array_equal(own.gate_DE, gate_DE)


@pytest.mark.parametrize(
    "field,value",
    [
        ("k", 2),
        ("importance_weight", 0.2),
        ("load_weight", 0.0),
        ("z_loss_weight", 0.1),
        ("branching", (2, 2)),
        ("seed", 3),
    ],
)
def test_settings_beside_a_router_instance_are_refused(field, value):
    own = softmax_top_k.SoftmaxTopKRouter(4)
    with pytest.raises(ValueError) as error:
        moe.SparseMoE(4, 5, gating=own, **{field: value})
    message = str(error.value)
    assert "give these settings to the router" in message
    assert f"'{field}': {value}" in message


def test_a_router_of_another_size_is_refused():
    own = softmax_top_k.SoftmaxTopKRouter(3, k=2)
    with pytest.raises(ValueError, match="num_experts=4, .*num_experts=3"):
        moe.SparseMoE(4, 5, gating=own)


@pytest.mark.parametrize("name", ["top_k", None, 2, ["switch"]])
def test_an_unknown_gating_is_refused(name):
    with pytest.raises(ValueError, match="`gating` must be one of noisy_top_k"):
        moe.SparseMoE(4, 5, gating=name)


@pytest.mark.parametrize(
    "field,value,kwargs",
    [
        ("load_weight", 0.1, {"gating": "batchwise"}),
        ("load_weight", 0.1, {"gating": "expert_choice"}),
        ("load_weight", 0.0, {"gating": "expert_choice"}),
        ("z_loss_weight", 0.1, {"branching": (2, 2)}),
    ],
)
def test_a_setting_without_meaning_is_refused(field, value, kwargs):
    with pytest.raises(ValueError, match=f"`{field}`.*: {field}={value}"):
        moe.SparseMoE(4, 5, **kwargs, **{field: value})


@pytest.mark.parametrize(
    "field,kwargs",
    [
        ("k", {"k": 5}),
        ("k", {"k": 0}),
        ("k", {"k": 1.0}),
        ("importance_weight", {"importance_weight": -1.0}),
        ("load_weight", {"load_weight": float("nan")}),
        ("z_loss_weight", {"z_loss_weight": float("inf")}),
    ],
)
def test_bad_settings_of_the_base_name_the_field(field, kwargs):
    with pytest.raises(ValueError, match=f"`{field}`.*Received: {field}="):
        router.Router(**{"num_experts": 4, "k": 2, **kwargs})
    with pytest.raises(ValueError, match="`num_experts`"):
        router.Router(0, 1)


CONFIGS = [
    {"gating": name, "k": 1, "importance_weight": 0.3, "z_loss_weight": 0.2}
    for name in NAMES
] + [
    {"branching": (2, 2), "k": 1, "load_weight": 0.3, "seed": 3},
    {"branching": (2, 2), "k": 1, "gating": "batchwise"},
]


@pytest.mark.parametrize("kwargs", CONFIGS, ids=str)
@pytest.mark.parametrize("built", [False, True])
def test_a_config_round_trip_keeps_every_setting(kwargs, built):
    layer = moe.SparseMoE(4, 5, drop_policy="gate_value", **kwargs)
    if built:
        layer.build((None, 6))
    again = moe.SparseMoE.from_config(layer.get_config())
    assert again.get_config() == layer.get_config()
    assert again.router.get_config() == layer.router.get_config()
    again.build((None, 6))
    again.set_weights(layer.get_weights() or again.get_weights())
    x_TD = tokens(5, 6)
    if built:
        np.testing.assert_array_equal(again(x_TD), layer(x_TD))


@pytest.mark.parametrize("built", [False, True])
def test_a_config_round_trip_of_a_router_instance(built):
    own = CosineRouter(4, k=3, spread_weight=0.7, importance_weight=0.2)
    layer = moe.SparseMoE(4, 5, gating=own, eval_capacity_factor=2.0)
    if built:
        layer.build((None, 6))
    again = moe.SparseMoE.from_config(layer.get_config())
    assert again.router.get_config() == own.get_config()
    assert again.get_config() == layer.get_config()
    again(tokens(5, 6))
    assert again.router.loss_weights == {
        "importance_loss": 0.2,
        "load_loss": 0.0,
        "spread_loss": 0.7,
    }


def test_a_router_under_mixed_precision_stays_float32():
    layer = moe.SparseMoE(
        3, 5, gating=CosineRouter(3, k=2), dtype="mixed_bfloat16"
    )
    assert layer(tokens(4, 6)).dtype == tf.bfloat16
    assert layer.router.code_ED.dtype == "float32"
    assert layer.router.dtype == "float32"


def compiled(layer, training, jit_compile):
    @tf.function(jit_compile=jit_compile)
    def call(x_TD):
        y_TD = layer(x_TD, training=training)
        return y_TD, [tf.convert_to_tensor(loss) for loss in layer.losses]

    def run(x_TD):
        y_TD, losses = call(tf.constant(x_TD))
        return y_TD.numpy(), [float(loss) for loss in losses]

    return run


@sets.JIT_COMPILE
@pytest.mark.parametrize("name", sets.split(NAMES, NAMES[::2]))
def test_a_broken_token_shows_and_stays_alone(name, jit_compile):
    # `expert_choice` has no loss but this one.
    layer = layer_of(name, importance_weight=0.1)
    evaluate = compiled(layer, False, jit_compile)
    train = compiled(layer, True, jit_compile)
    want_TD, _ = evaluate(tokens(9, 6))
    others = np.arange(9) != 3
    for bad in (np.nan, np.inf, -np.inf):
        x_TD = tokens(9, 6)
        x_TD[3, 2] = bad
        y_TD, _ = evaluate(x_TD)
        assert np.isnan(y_TD[3]).all() and np.isfinite(y_TD[others]).all()
        if name != "expert_choice":  # there it takes the place of another
            np.testing.assert_allclose(y_TD[others], want_TD[others], rtol=1e-9)
        y_TD, losses = train(x_TD)
        assert np.isnan(y_TD[3]).all() and np.isfinite(y_TD[others]).all()
        assert losses and np.isnan(losses).all()


@sets.JIT_COMPILE
@pytest.mark.parametrize("name", [n for n in NAMES if n != "switch"])
def test_all_experts_for_every_token(name, jit_compile):
    # With k = n the output is the full softmax mixture, equation 2 (of noisy
    # logits where there is noise, so that one is looked at without). The
    # thresholds are put below all scores.
    layer = layer_of(name, num_experts=3, k=3)
    if name == "batchwise":
        layer.router.threshold_E.assign(np.zeros(3))
    x_TD = tokens(7, 6)
    probability_TE = np.exp(x_TD @ np.asarray(layer.router.gate_DE))
    probability_TE /= probability_TE.sum(-1, keepdims=True)
    hidden = np.maximum(np.einsum("TD,EDF->TEF", x_TD, layer.experts.in_EDF), 0)
    want_TD = np.einsum(
        "TE,TEF,EFD->TD", probability_TE, hidden, layer.experts.out_EFD
    )
    for training in (False, True)[: 1 if name == "noisy_top_k" else 2]:
        y_TD, _ = compiled(layer, training, jit_compile)(x_TD)
        np.testing.assert_allclose(y_TD, want_TD, rtol=1e-8, atol=1e-10)
        np.testing.assert_array_equal(layer.balance.assigned_E, [7.0] * 3)


@pytest.mark.parametrize(
    "name,jit_compile",
    sets.split(
        itertools.product(NAMES, (False, True)),
        [*((name, False) for name in NAMES), ("noisy_top_k", True)],
        [("softmax_top_k", True), ("expert_choice", True)],
    ),
)
def test_equal_logits_are_settled_by_order(name, jit_compile):
    layer = layer_of(name, num_experts=4)
    layer.router.gate_DE.assign(np.zeros((6, 4)))
    # Noise settles ties in training.
    for training in (False, True)[: 1 if name == "noisy_top_k" else 2]:
        y_TD, losses = compiled(layer, training, jit_compile)(tokens(6, 6))
        assert np.isfinite(y_TD).all() and np.isfinite(losses).all()
        if name in ("noisy_top_k", "softmax_top_k"):  # the first experts
            want_E = [6, 6, 0, 0]
        elif name == "switch":
            want_E = [6, 0, 0, 0]
        elif name == "batchwise" and not training:
            want_E = [0, 0, 0, 0]  # a score of 1 / n does not pass 1 / n
        else:
            want_E = [3, 3, 3, 3]  # the earlier tokens
            assert np.abs(y_TD[:3]).max(axis=1).all() and not y_TD[3:].any()
        np.testing.assert_array_equal(layer.balance.assigned_E, want_E)
