"""What holds for both architectures, with experts and without."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from moe_tf.models.translation import factory
from tests import sets
from tests.reference import translation as reference

V = 19
SIZES = {
    "GNMT": {"cells": 12, "attention_units": 6},
    "Transformer": {
        "num_heads": 2,
        "feed_forward": 12,
        "encoder_layers": 2,
        "decoder_layers": 2,
    },
}
CASES = {
    "GNMT": {},
    "GNMT-wide": {"attention_form": "sum", "bidirectional": True},
    "GNMT-MoE-6": {"moe": {"k": 2, "gating": "softmax_top_k"}},
    "GNMT-MoE-2x3-h": {"bidirectional": True},
    "Transformer": {},
    "Transformer-MoE-4": {"tie_embeddings": False},
}
QUICK = "GNMT-MoE-2x3-h", "GNMT-wide", "Transformer-MoE-4"
LENGTHS = np.array([6, 3, 5])


def make(name, /, **kwargs):
    settings = {"width": 8, "seed": 1, **SIZES[name.split("-")[0]]}
    settings |= {**CASES.get(name, {}), **kwargs}
    model = factory.make_translation_model(name, V, **settings)
    model.build()
    return model


def spread(model, scale=0.5):
    """Weights far from their start, so that all parts are at work."""
    rng = np.random.default_rng(2)
    for weight in model.trainable_weights:
        noise = rng.normal(scale=scale, size=weight.shape)
        weight.assign(
            noise + ("norm" in weight.path and "gamma" in weight.path)
        )
    return model


def text(*shape, seed=0):
    return np.random.default_rng(seed).integers(4, V, shape).astype("int32")


def batch():
    """Three sentences of different lengths and what is said of them so far."""
    source, tokens = text(3, 6), text(3, 5, seed=1)
    source *= np.arange(6) < LENGTHS[:, None]
    tokens[:, 0] = 2
    return {"source": source, "tokens": tokens}


def close(got, want, tolerance=1e-4):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "name",
    sets.split(CASES, QUICK),
)
def test_logits_match_numpy_and_so_does_stepping(name):
    model, inputs = spread(make(name)), batch()
    logits = model(inputs)
    assert logits.shape == (3, 5, V) and logits.dtype == tf.float32
    if "GNMT" in name:
        want, weights = reference.gnmt(model, inputs)
    else:
        want, weights = reference.transformer(model, inputs, heads=2)
    close(logits, want, 1e-3)
    memory = model.encode(inputs["source"])
    states = model.initial_states(memory, 7)
    step = tf.function(model.step)
    for position in range(5):
        got, states, weight_BS = step(
            tf.constant(inputs["tokens"][:, position]), states, memory
        )
        close(got, logits[:, position])
        assert weight_BS.dtype == tf.float32
        close(weight_BS, weights[:, position], 1e-3)
    for leaf in (*memory.values(), *states.values()):
        assert leaf.shape[0] == 3


@pytest.mark.parametrize(
    "name",
    sets.split(
        CASES,
        ("GNMT-MoE-2x3-h", "Transformer-MoE-4"),
        ("GNMT", "Transformer"),
    ),
)
def test_later_words_and_padding_change_no_word_before(name):
    model, inputs = spread(make(name)), batch()
    want = np.asarray(model(inputs))
    source, tokens = inputs["source"], inputs["tokens"]
    changed = tokens.copy()
    changed[:, 3:] = (tokens[:, 3:] + 1) % V
    wider = {
        "source": np.pad(source, ((0, 1), (0, 3))),
        "tokens": np.pad(tokens, ((0, 1), (0, 2))),
    }
    for other, length in (
        ({"source": source, "tokens": changed}, 3),
        ({"source": source, "tokens": tokens[:, :3]}, 3),
        (wider, 5),
    ):
        got = np.asarray(model(other))
        assert np.isfinite(got).all()
        close(got[:3, :length], want[:, :length])
    longer = {"source": np.where(source == 0, 5, source), "tokens": tokens}
    assert np.abs(np.asarray(model(longer)) - want).max() > 1e-2


# Randomness, precision, XLA, saving.


@pytest.mark.parametrize(
    "name", [sets.thorough("GNMT-MoE-2x3-h"), "Transformer-MoE-4"]
)
def test_same_seed_same_draws_and_layers_draw_apart(name):
    settings = {"dropout": 0.5}
    if "GNMT" in name:
        settings["moe"] = {"gating": "noisy_top_k"}
    inputs = batch()
    first, second, other = (
        spread(make(name, seed=seed, **settings)) for seed in (7, 7, 8)
    )
    calls = [np.asarray(first(inputs, training=True)) for _ in range(2)]
    assert (calls[0] != calls[1]).any()
    for call in calls:
        np.testing.assert_array_equal(call, second(inputs, training=True))
    assert (calls[0] != np.asarray(other(inputs, training=True))).any()
    np.testing.assert_array_equal(first(inputs), first(inputs))
    drawn = [
        layer.seed
        for layer in first._flatten_layers()
        if getattr(layer, "seed", None) is not None
        and "moe" not in layer.name
        and not hasattr(layer, "feed_forward")
    ]
    assert len(drawn) == len(set(drawn)) >= 3


@pytest.mark.parametrize(
    "name",
    sets.split(CASES, QUICK),
)
def test_without_dropout_and_noise_training_is_inference(name):
    moe = {"gating": "softmax_top_k"} if name[-1] in "46" else {}
    if name.endswith("-h"):
        return  # noisy gates alone have two levels
    model, inputs = spread(make(name, dropout=0.0, moe=moe)), batch()
    close(model(inputs, training=True), model(inputs))


@pytest.mark.parametrize(
    "name", ["GNMT-MoE-6", sets.thorough("Transformer-MoE-4")]
)
def test_settings_reach_every_mixture(name):
    moe = {"gating": "batchwise", "capacity_factor": 1.5, "recompute": True}
    model = make(name, moe={**moe, "k": 2})
    mixtures = [
        layer for layer in model._flatten_layers() if layer.name[-4:] == "_moe"
    ]
    if "GNMT" in name:
        want = ["encoder_moe", "decoder_moe"]
    else:
        want = ["encoder_1_moe", "decoder_1_moe"]
    assert [layer.name for layer in mixtures] == want
    for layer in mixtures:
        assert type(layer.router).__name__ == "BatchwiseRouter"
        assert layer.capacity_factor == 1.5 and layer.experts.recompute
    none = make(name, moe={"importance_weight": 0.0, "load_weight": 0.0})
    none(batch(), training=True)
    assert float(sum(none.losses, 0.0)) == 0


@pytest.mark.slow
def test_strictly_balanced_experts_of_two_levels_train():
    # The paper's models of one language pair.
    model = factory.make_translation_model(
        "GNMT-MoE-4x4-h", V, moe={"gating": "batchwise"}, width=16, seed=1
    )
    model.compile(
        "adam",
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    inputs, targets = batch(), text(3, 5, seed=2)
    losses = [
        model.train_on_batch(inputs, targets, return_dict=True)["loss"]
        for _ in range(5)
    ]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    layers = {layer.name: layer for layer in model._flatten_layers()}
    for name, ids in (
        ("encoder_moe", inputs["source"]),
        ("decoder_moe", inputs["tokens"]),
    ):
        m_P = -(-2 * np.count_nonzero(ids) // 4)
        balance = layers[name].balance
        np.testing.assert_array_equal(balance.assigned_E, -(-2 * m_P // 4))


@pytest.mark.parametrize("name", ["GNMT-MoE-6", "Transformer-MoE-4"])
def test_padding_is_not_routed(name):
    model, inputs = spread(make(name, moe={"k": 2})), batch()
    inputs["tokens"][1, 2:] = 0
    model(inputs)
    assigned = [
        int(np.sum(layer.balance.assigned_E))
        for layer in model._flatten_layers()
        if layer.name[-4:] == "_moe"
    ]
    assert assigned == [
        2 * (inputs[side] != 0).sum() for side in ("source", "tokens")
    ]


@pytest.mark.parametrize(
    "name", [sets.thorough("GNMT-wide"), "Transformer-MoE-4"]
)
def test_mixed_precision_is_close_to_float32(name):
    inputs, results = batch(), []
    for dtype in ("float32", "mixed_bfloat16"):
        model = spread(make(name, dropout=0.0, dtype=dtype), scale=0.2)
        with tf.GradientTape() as tape:
            logits = model(inputs)
            loss = tf.reduce_mean(tf.reduce_logsumexp(logits, -1))
        assert logits.dtype == tf.float32
        variables = [w.value for w in model.trainable_weights]
        gradients = tape.gradient(loss, variables, unconnected_gradients="zero")
        norm = tf.linalg.global_norm(gradients)
        results.append((float(loss), float(norm)))
        memory = model.encode(inputs["source"])
        states = model.initial_states(memory, 5)
        got, _, weights = model.step(inputs["tokens"][:, 0], states, memory)
        assert got.dtype == weights.dtype == tf.float32
        close(got, logits[:, 0], 1e-5 if dtype == "float32" else 3e-2)
    (loss, norm), (mixed_loss, mixed_norm) = results
    assert mixed_loss == pytest.approx(loss, rel=0.02)
    assert mixed_norm == pytest.approx(norm, rel=0.1)


@pytest.mark.parametrize(
    "name", ["GNMT-MoE-2x3-h", sets.thorough("Transformer-MoE-4")]
)
def test_saved_model_computes_the_same(name, tmp_path):
    model, inputs = spread(make(name)), batch()
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded) is type(model)
    np.testing.assert_array_equal(model(inputs), loaded(inputs))


@pytest.mark.parametrize("name", ["GNMT-MoE-6", "Transformer-MoE-4"])
def test_config_holds_every_argument(name):
    moe = {
        "num_experts": 3,
        "k": 2,
        "hidden_units": 5,
        "gating": "softmax_top_k",
        "importance_weight": 0.2,
        "load_weight": 0.3,
        "capacity_factor": 1.5,
        "num_groups": 2,
        "recompute": True,
    }
    model = make(name, dropout=0.3, moe=moe, name="mt")
    config = model.get_config()
    arguments = {"dropout": 0.3, "moe": moe, "seed": 1}
    arguments |= {"variant": name, "vocabulary_size": V, "width": 8}
    assert {**arguments, "name": "mt"}.items() <= config.items()
    copy = type(model).from_config(config)
    assert copy.get_config() == config and copy.variant == model.variant


@pytest.mark.parametrize(
    "name",
    [
        sets.thorough("GNMT"),
        pytest.param("Transformer", marks=pytest.mark.slow),
    ],
)
def test_an_exported_model_takes_ids_of_any_length(name, tmp_path):
    model = make(name)
    model.export(tmp_path / "exported", verbose=False)
    served = tf.saved_model.load(tmp_path / "exported")
    inputs = {key: tf.constant(value) for key, value in batch().items()}
    close(served.serve(inputs), model(inputs), 1e-5)
    short = {key: value[:2, :3] for key, value in inputs.items()}
    close(served.serve(short), model(short), 1e-5)


@pytest.mark.parametrize(
    "name,paths",
    [
        (
            "GNMT-MoE-6",
            {
                "softmax/kernel",
                "source_embedding/embeddings",
                "target_embedding/embeddings",
                "encoder_lstm_0/cell/projection_kernel",
                "encoder_moe/router/gate_kernel",
                "encoder_lstm_2/cell/kernel",
                "decoder_lstm_0/recurrent_kernel",
                "decoder_lstm_0/attention/source_kernel",
                "decoder_lstm_0/attention/query_kernel",
                "decoder_lstm_0/attention/scale",
                "decoder_moe/experts/expert_in_kernel",
                "decoder_lstm_1/cell/kernel",
            },
        ),
        (
            "Transformer-MoE-4",
            {
                "softmax/kernel",
                "encoder_0/attention/query_key_value_kernel",
                "encoder_0/feed_forward/dense_0/kernel",
                "encoder_1/encoder_1_moe/experts/expert_in_kernel",
                "decoder_0/source_attention/key_value_kernel",
                "decoder_1/decoder_1_moe/router/noise_kernel",
                "decoder_1/source_norm/gamma",
                "decoder_norm/beta",
            },
        ),
    ],
)
def test_names_of_weights_are_stable(name, paths):
    weights = make(name, name="mt").trainable_weights
    assert paths < {w.path.removeprefix("mt/") for w in weights}
    assert not any("bias" in w.path for w in weights)
