import math
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from moe_tf.layers import BatchwiseRouter
from moe_tf.models.language import variants
from moe_tf.models.language.model import LanguageModel
from tests import sets
from tests.reference.lstm import lstm
from tests.reference.lstm import sigmoid

NAMES = [
    "4xLSTM-512",
    "LSTM-2048-512",
    "2xLSTM-8192-1024",
    "MoE-1-Wide",
    "MoE-1-Deep",
    "MoE-4",
    "MoE-32",
    "MoE-4x3-h",
]
VOCABULARY_SIZE = 19


def make(variant, **kwargs):
    kwargs = {"width": 8, "seed": 1, **kwargs}
    model = LanguageModel(variant, VOCABULARY_SIZE, **kwargs)
    model.build()
    return model


def spread(model):
    """Weights far from their start, so that gates and LSTMs are at work."""
    rng = np.random.default_rng(2)
    for weight in model.trainable_weights:
        weight.assign(rng.normal(scale=0.7, size=weight.shape))
    return model


def text(*shape):
    return np.random.default_rng(0).integers(1, VOCABULARY_SIZE, shape)


# What is built.


@pytest.mark.parametrize(
    "name,width",
    [
        (name, width)
        if width
        else (sets.slow if name.startswith("MoE-256") else sets.thorough)(
            name, width
        )
        for name in [*NAMES, "MoE-256", "MoE-256-h", "MoE-34M", "MoE-143M"]
        for width in (16, None)
        # Their orthogonal start alone takes half a minute, or the weights
        # more memory than a test should.
        if width or name not in ("2xLSTM-8192-1024", "MoE-34M", "MoE-143M")
    ],
)
def test_weights_are_as_many_as_counted(name, width):
    model = make(name, width=width)
    shapes = [tuple(w.shape) for w in model.trainable_weights]
    vocabulary = variants.vocabulary_parameters(model.variant, VOCABULARY_SIZE)
    want = variants.count(model.variant).parameters
    assert sum(map(math.prod, shapes)) - vocabulary == want
    assert sorted(shapes) == sorted(
        variants.kernel_shapes(model.variant, VOCABULARY_SIZE)
    )


@pytest.mark.parametrize("gating", ["softmax_top_k", "switch", "batchwise"])
def test_weights_of_other_gates_are_counted(gating):
    k = 1 if gating == "switch" else 2
    model = make("MoE-4", moe={"gating": gating, "k": k})
    shapes = [tuple(w.shape) for w in model.trainable_weights]
    vocabulary = variants.vocabulary_parameters(model.variant, VOCABULARY_SIZE)
    want = variants.count(model.variant).parameters
    assert sum(map(math.prod, shapes)) - vocabulary == want
    assert sorted(shapes) == sorted(
        variants.kernel_shapes(model.variant, VOCABULARY_SIZE)
    )


def test_weights_have_stable_names_and_no_biases():
    paths = [w.path for w in make("MoE-4", name="lm").trainable_weights]
    assert paths == [
        "lm/embedding/embeddings",
        "lm/lstm_0/lstm_cell/kernel",
        "lm/lstm_0/lstm_cell/recurrent_kernel",
        "lm/moe/router/gate_kernel",
        "lm/moe/router/noise_kernel",
        "lm/moe/experts/expert_in_kernel",
        "lm/moe/experts/expert_out_kernel",
        "lm/lstm_1/lstm_cell/kernel",
        "lm/lstm_1/lstm_cell/recurrent_kernel",
        "lm/softmax/kernel",
    ]


# What is computed.


def expected_logits(model, tokens):
    """The whole model in numpy, with the experts alone from Keras."""
    x = np.asarray(model.embedding.embeddings)[tokens]
    for block in model.blocks:
        weights = [np.asarray(w) for w in block.trainable_weights]
        if "lstm" in block.name:
            x = x + lstm(x, *weights)[0]
        elif block.name == "moe":
            x = x + sigmoid(np.asarray(block(x, mask=tokens != 0)))
        else:
            y = x
            for kernel in weights[:-1]:
                y = np.maximum(y @ kernel, 0)
            x = x + sigmoid(y @ weights[-1])
    return x @ np.asarray(model.softmax.kernel_VD).T


@pytest.mark.parametrize("name", NAMES)
def test_logits_match_numpy(name):
    model, tokens = spread(make(name)), text(3, 5)
    got = model(tokens)
    assert got.shape == (3, 5, VOCABULARY_SIZE) and got.dtype == tf.float32
    want = expected_logits(model, tokens)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", sets.split(NAMES, NAMES[::3]))
def test_stepping_equals_reading_the_whole_text(name):
    model, tokens = spread(make(name)), text(3, 6)
    tokens[1, 4:] = 0
    want = model(tokens)
    step, states = tf.function(model.step), model.initial_states(3)
    for position in range(6):
        got, states = step(tf.constant(tokens[:, position]), states)
        np.testing.assert_allclose(got, want[:, position], rtol=1e-4, atol=1e-4)


def test_dropout_comes_after_the_sigmoid_and_before_the_residual():
    model = make("MoE-1-Wide", dropout=0.5)
    for weight in model.trainable_weights:
        weight.assign(np.zeros(weight.shape))
    model.embedding.embeddings.assign(
        np.full(model.embedding.embeddings.shape, 4.0)
    )
    # LSTMs give 0, the feed-forward net sigmoid(0); what is kept doubles.
    got = np.asarray(model.features(text(5, 7), training=True))
    assert set(got.ravel()) == {0.0, 1.0, 8.0, 9.0}
    assert set(np.ravel(model.features(text(5, 7)))) == {4.5}


@pytest.mark.parametrize("name", ["4xLSTM-512", "MoE-32"])
def test_later_words_and_padding_change_nothing_before(name):
    model, tokens = spread(make(name)), text(3, 8)
    want = np.asarray(model(tokens))[:, :5]
    changed = tokens.copy()
    changed[:, 5:] = changed[:, 5:] % (VOCABULARY_SIZE - 1) + 1
    assert (changed[:, 5:] != tokens[:, 5:]).all()
    padded = tokens.copy()
    padded[:, 5:] = 0
    for other in (changed, padded, tokens[:, :5]):
        got = np.asarray(model(other))[:, :5]
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_padding_is_not_routed():
    model, tokens = spread(make("MoE-32", moe={"k": 2})), text(3, 8)
    tokens[0, 3:] = 0
    model(tokens, training=True)
    assigned_E = model.get_layer("moe").balance.assigned_E
    assert np.sum(assigned_E) == 2 * (tokens != 0).sum()


def test_balancing_losses_and_settings_reach_the_experts():
    tokens = text(3, 8)
    weights = {"importance_weight": 0.2, "load_weight": 0.3}
    full = spread(make("MoE-32", moe=weights))
    full(tokens)
    assert full.losses == []
    full(tokens, training=True)
    weights = {"importance_weight": 0.0, "load_weight": 0.0}
    none = spread(make("MoE-32", moe=weights))
    none(tokens, training=True)
    assert float(sum(full.losses)) > 0
    assert float(sum(none.losses, 0.0)) == 0
    settings = {"k": 3, "capacity_factor": 1.5}
    moe = make("MoE-32", moe=settings).get_layer("moe")
    assert moe.k == 3 and moe.capacity_factor == 1.5
    moe = make("MoE-4x3-h", moe={"recompute": True}).get_layer("moe")
    assert moe.router.branching == (4, 3) and moe.experts.recompute
    moe = make("MoE-32", moe={"gating": "batchwise"}).get_layer("moe")
    assert isinstance(moe.router, BatchwiseRouter)


# Randomness, precision, saving.


def test_same_seed_same_draws_and_layers_draw_apart():
    tokens = text(3, 8)
    first, second, other = (
        spread(make("MoE-4", dropout=0.5, seed=seed)) for seed in (7, 7, 8)
    )
    calls = [np.asarray(first(tokens, training=True)) for _ in range(2)]
    assert (calls[0] != calls[1]).any()
    for call in calls:
        np.testing.assert_array_equal(call, second(tokens, training=True))
    assert (calls[0] != np.asarray(other(tokens, training=True))).any()
    moe = first.get_layer("moe")
    seeds = {first.dropout.seed, moe.router.seed, first.softmax.seed}
    assert len(seeds) == 3


@pytest.mark.parametrize(
    "name", [*map(sets.thorough, ("LSTM-2048-512", "MoE-1-Deep")), "MoE-32"]
)
def test_mixed_precision_is_close_to_float32(name):
    tokens, targets = text(4, 8), text(4, 8)
    results = []
    for dtype in ("float32", "mixed_bfloat16"):
        model = spread(make(name, width=32, dropout=0.0, dtype=dtype))
        for weight in model.trainable_weights:
            weight.assign(weight * 0.2)
        with tf.GradientTape() as tape:
            logits = model(tokens, training=False)
            loss = tf.reduce_mean(
                tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits)
            )
        variables = [w.value for w in model.trainable_weights]
        gradients = tape.gradient(loss, variables, unconnected_gradients="zero")
        assert logits.dtype == tf.float32
        norm = tf.linalg.global_norm(gradients)
        results.append((float(loss), float(norm)))
    (loss, norm), (mixed_loss, mixed_norm) = results
    assert norm > 0.05
    assert mixed_loss == pytest.approx(loss, rel=0.02)
    assert mixed_norm == pytest.approx(norm, rel=0.1)


@pytest.mark.parametrize("name", sets.split(NAMES, NAMES[::3]))
def test_saved_model_computes_the_same(name, tmp_path):
    model, tokens = spread(make(name, num_sampled=5)), text(3, 5)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert isinstance(loaded, LanguageModel)
    np.testing.assert_array_equal(model(tokens), loaded(tokens))


def test_config_holds_every_argument():
    arguments = {
        "variant": "MoE-32",
        "vocabulary_size": 19,
        "width": 8,
        "dropout": 0.3,
        "moe": {
            "num_experts": 16,
            "k": 2,
            "hidden_units": 6,
            "gating": "softmax_top_k",
            "importance_weight": 0.2,
            "load_weight": 0.4,
            "capacity_factor": 1.5,
            "num_groups": 2,
            "recompute": True,
        },
        "num_sampled": 5,
        "seed": 6,
        "name": "lm",
    }
    config = LanguageModel(**arguments, dtype="mixed_bfloat16").get_config()
    assert arguments.items() <= config.items()
    copy = LanguageModel.from_config(config)
    assert copy.get_config() == config
    assert copy.dtype_policy.name == "mixed_bfloat16"


@pytest.mark.thorough
def test_a_saved_model_loads_where_only_moe_tf_is_imported(tmp_path):
    model = LanguageModel("MoE-4", 9, width=6, seed=0)
    tokens_BL = np.array([[2, 5, 6, 3], [2, 7, 3, 0]])
    want_BLV = np.asarray(model(tokens_BL))
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "tokens.npy", tokens_BL)
    script = (
        "import sys, keras, moe_tf, numpy as np;"
        "model = keras.models.load_model(sys.argv[1] + '/model.keras');"
        "tokens = np.load(sys.argv[1] + '/tokens.npy');"
        "np.save(sys.argv[1] + '/logits.npy', np.asarray(model(tokens)))"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], check=True, timeout=200
    )
    got_BLV = np.load(tmp_path / "logits.npy")
    np.testing.assert_allclose(got_BLV, want_BLV, atol=1e-6)


def test_an_exported_model_takes_ids_of_any_length(tmp_path):
    model = LanguageModel("MoE-4", 9, width=6, seed=0)
    model.build()
    model.export(tmp_path / "exported", verbose=False)
    served = tf.saved_model.load(tmp_path / "exported")
    for shape in ((2, 5), (1, 3)):
        tokens_BL = np.random.default_rng(0).integers(1, 9, shape)
        tokens_BL = tf.constant(tokens_BL, tf.int32)
        np.testing.assert_allclose(
            served.serve(tokens_BL), model(tokens_BL), atol=1e-6
        )
