import keras
import numpy as np
import pytest
import tensorflow as tf

from moe_tf.models import TranslationScorer
from moe_tf.models.translation import factory
from tests import sets

V = 24
SMALL = {
    "GNMT": {"cells": 24, "encoder_layers": 2},
    "Transformer": {
        "num_heads": 2,
        "encoder_layers": 1,
        "decoder_layers": 1,
    },
    "Transformer-MoE-4": {"moe_every": 1},
}


def make(name, label_smoothing=0.0, jit_compile=False, rate=0.01, **kwargs):
    settings = {"width": 16, "seed": 1, "dropout": 0.0}
    settings |= {**SMALL[name.split("-")[0]], **SMALL.get(name, {}), **kwargs}
    scorer = TranslationScorer(
        factory.make_translation_model(name, V, **settings), label_smoothing
    )
    scorer.build()
    scorer.compile_for_words(
        keras.optimizers.Adam(rate), jit_compile=jit_compile
    )
    return scorer


def copying(num_sequences, length, seed):
    """A sentence's translation is the sentence, END after it."""
    rng = np.random.default_rng(seed)
    words = rng.integers(4, V, (num_sequences, length)).astype("int32")
    lengths = rng.integers(2, length, num_sequences)[:, None]
    positions = np.arange(length)
    words = np.where(positions < lengths, words, 0)
    targets = np.where(positions == lengths, 3, words)
    tokens = np.concatenate([np.full_like(words[:, :1], 2), words], axis=1)
    tokens = np.where(positions <= lengths, tokens[:, :-1], 0)
    return as_data(targets, tokens, targets)


def as_data(source, tokens, targets):
    inputs = {"source": source, "tokens": tokens, "targets": targets}
    return inputs, targets, (targets != 0).astype("float32")


def padded(data, rows, columns, source_columns):
    inputs, _, _ = data
    more = {"source": source_columns, "tokens": columns, "targets": columns}
    return as_data(
        *(
            np.pad(inputs[name], ((0, rows), (0, number)))
            for name, number in more.items()
        )
    )


def evaluate(scorer, data):
    x, y, weights = data
    return scorer.evaluate(
        x, y, 8, sample_weight=weights, verbose=0, return_dict=True
    )


@pytest.mark.parametrize(
    "name",
    [
        sets.thorough("GNMT-MoE-4"),
        # This learns in `tests/trainers/machine_translation_test.py`.
        pytest.param("Transformer-MoE-4", marks=pytest.mark.slow),
    ],
)
def test_fit_learns_to_copy(name):
    scorer = make(name, moe={"k": 2}, rate=0.03)
    x, y, weights = data = copying(8, 5, seed=0)
    before = evaluate(scorer, data)
    logs = scorer.fit(
        x, y, 8, epochs=40, sample_weight=weights, verbose=0
    ).history
    after = evaluate(scorer, data)
    assert before["perplexity"] > 0.6 * V
    assert after["perplexity"] < 1.5
    assert after["words"] == weights.sum() == logs["words"][-1]
    assert {"loss", "perplexity", "words"} < set(logs)


@pytest.mark.parametrize("label_smoothing", [sets.thorough(0.0), 0.1])
def test_loss_is_the_smoothed_mean_and_perplexity_is_not(label_smoothing):
    scorer = make("GNMT", label_smoothing)
    x, _, weights = data = padded(copying(3, 5, seed=0), 1, 2, 3)
    logits = np.asarray(scorer.translation_model(x), "float64")
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    smooth = (1 - label_smoothing) * np.eye(V)[x["targets"]]
    smooth += label_smoothing / V
    losses = -(smooth * log_p).sum(-1)
    own = np.take_along_axis(-log_p, x["targets"][..., None], -1)[..., 0]
    logs = evaluate(scorer, data)
    real = weights == 1
    assert logs["loss"] == pytest.approx(losses[real].mean(), rel=1e-5)
    assert logs["perplexity"] == pytest.approx(
        np.exp(own[real].mean()), rel=1e-5
    )
    assert logs["words"] == real.sum()
    np.testing.assert_allclose(
        scorer(x)[..., 0][real], own[real], rtol=1e-4, atol=1e-5
    )
    assert scorer(x).dtype == tf.float32


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name,settings",
    [
        sets.slow("GNMT-MoE-4", {"bidirectional": True}),
        ("Transformer-MoE-4", {}),
    ],
)
def test_padding_changes_neither_loss_nor_gradients(name, settings):
    short = copying(4, 6, seed=0)
    keras.utils.set_random_seed(3)
    moe = {"k": 2, "gating": "softmax_top_k"}
    scorer = make(name, 0.1, moe=moe, **settings)
    variables = [weight.value for weight in scorer.trainable_weights]

    @tf.function(reduce_retracing=True)
    def evaluate(x, weights):
        with tf.GradientTape() as tape:
            losses = scorer(x, training=True)
            loss = tf.reduce_sum(losses @ [[0.9], [0.1]] * weights[..., None])
            loss += sum(scorer.losses)
        gradients = tape.gradient(loss, variables)
        return loss, [tf.convert_to_tensor(g) for g in gradients]

    (loss, gradients), *others = (
        evaluate({key: tf.constant(value) for key, value in x.items()}, weights)
        for x, _, weights in (
            short,
            padded(short, 2, 3, 5),
            padded(short, 0, 0, 1),
        )
    )
    assert all(np.abs(gradient).max() > 1e-6 for gradient in gradients)
    for other_loss, other_gradients in others:
        assert float(other_loss) == pytest.approx(float(loss), rel=1e-5)
        for got, want in zip(other_gradients, gradients, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "name", [sets.slow("GNMT"), sets.thorough("Transformer-MoE-4")]
)
def test_xla_trains_alike(name):
    x, y, weights = copying(4, 6, seed=0)
    losses = []
    for jit_compile in (False, True):
        keras.utils.set_random_seed(3)
        moe = {"gating": "softmax_top_k", "k": 2} if "MoE" in name else {}
        scorer = make(name, 0.1, jit_compile, moe=moe)
        # Not Adam, which makes as much of a gradient of rounding errors.
        scorer.compile_for_words(
            keras.optimizers.SGD(0.5), jit_compile=jit_compile
        )
        losses.append(
            [scorer.train_on_batch(x, y, weights)[0] for _ in range(3)]
        )
    np.testing.assert_allclose(*losses, rtol=1e-4)
    assert losses[0][2] < losses[0][0]


def test_saved_scorer_computes_the_same(tmp_path):
    scorer = make("Transformer", label_smoothing=0.2)
    x, _, _ = copying(4, 6, seed=0)
    scorer.save(tmp_path / "scorer.keras")
    loaded = keras.models.load_model(tmp_path / "scorer.keras")
    assert loaded.label_smoothing == 0.2
    np.testing.assert_array_equal(scorer(x), loaded(x))


@pytest.mark.parametrize("label_smoothing", [-0.1, 1.0])
def test_smoothing_must_be_a_share(label_smoothing):
    with pytest.raises(ValueError, match=f"label_smoothing={label_smoothing}"):
        make("GNMT", label_smoothing)
