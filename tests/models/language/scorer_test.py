import keras
import numpy as np
import pytest
import tensorflow as tf

from moe_tf.metrics import Perplexity
from moe_tf.models.language.model import LanguageModel
from moe_tf.models.language.scorer import MeanOverWords
from moe_tf.models.language.scorer import NextWordScorer
from tests import sets

VOCABULARY_SIZE = 40
SUCCESSORS = ((1, 0.75), (7, 0.25))


def make(variant, optimizer=None, jit_compile="auto", **kwargs):
    kwargs = {"width": 16, "seed": 1, **kwargs}
    model = LanguageModel(variant, VOCABULARY_SIZE, **kwargs)
    scorer = NextWordScorer(model)
    scorer.compile_for_words(
        optimizer or keras.optimizers.Adam(0.01), jit_compile=jit_compile
    )
    return scorer


def markov_text(num_sequences, length, seed):
    """Words of which each has two successors, at odds of three to one."""
    rng = np.random.default_rng(seed)
    words = np.empty((num_sequences, length + 1), "int32")
    words[:, 0] = rng.integers(1, VOCABULARY_SIZE, num_sequences)
    jumps, odds = zip(*SUCCESSORS, strict=True)
    for position in range(length):
        jump = rng.choice(jumps, num_sequences, p=odds)
        after = words[:, position] + jump - 1
        words[:, position + 1] = after % (VOCABULARY_SIZE - 1) + 1
    return as_data(words[:, :-1], words[:, 1:])


def as_data(tokens, targets):
    weights = (targets != 0).astype("float32")
    return {"tokens": tokens, "targets": targets}, targets, weights


def padded(data, rows, columns):
    inputs, _, _ = data
    return as_data(
        *(
            np.pad(inputs[name], ((0, rows), (0, columns)))
            for name in ("tokens", "targets")
        )
    )


def evaluate(scorer, data, **kwargs):
    x, y, weights = data
    return scorer.evaluate(
        x, y, sample_weight=weights, verbose=0, return_dict=True, **kwargs
    )


@pytest.mark.parametrize(
    "variant,num_sampled",
    [
        sets.thorough("LSTM-2048-512", None),
        ("MoE-8", 15),
        pytest.param("MoE-4", None, marks=pytest.mark.slow),
    ],
)
def test_fit_reaches_the_entropy_of_the_text(variant, num_sampled):
    rate = keras.optimizers.schedules.CosineDecay(0.02, decay_steps=6 * 32)
    optimizer = keras.optimizers.Adam(rate)
    scorer = make(variant, optimizer, dropout=0.0, num_sampled=num_sampled)
    x, y, weights = markov_text(1024, 10, seed=0)
    held_out = markov_text(256, 10, seed=1)
    before = evaluate(scorer, held_out, batch_size=64)
    scorer.fit(x, y, 32, epochs=6, sample_weight=weights, verbose=0)
    after = evaluate(scorer, held_out, batch_size=64)
    odds = np.array([p for _, p in SUCCESSORS])
    optimum = np.exp(-(odds * np.log(odds)).sum())  # 1.755
    assert before["perplexity"] > 0.7 * VOCABULARY_SIZE
    assert 0.95 * optimum < after["perplexity"] < 1.07 * optimum
    assert before["words"] == after["words"] == 2560


def test_scores_are_those_of_the_logits():
    scorer = make("MoE-4", num_sampled=5)
    x, targets, _ = markov_text(3, 5, seed=0)
    logits = scorer.language_model(x["tokens"])
    want = tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits)
    np.testing.assert_allclose(scorer(x), want, rtol=1e-5)
    sampled = np.asarray(scorer(x, training=True))
    assert sampled.shape == (3, 5) and (sampled < np.asarray(want)).all()


def test_loss_is_the_mean_over_words_and_the_balancing_losses():
    scorer = make("MoE-4", dropout=0.0)
    x, y, weights = data = padded(markov_text(3, 5, seed=0), 1, 2)
    nll = np.asarray(scorer(x))
    logs = evaluate(scorer, data)
    mean = nll[weights == 1].mean()
    assert logs["loss"] == pytest.approx(mean, rel=1e-5)
    assert logs["perplexity"] == pytest.approx(np.exp(mean), rel=1e-5)
    assert logs["words"] == 15
    with tf.GradientTape():
        nll = scorer(x, training=True)
        total = scorer.compute_loss(x, y, nll, weights, training=True)
    balancing = sum(float(loss) for loss in scorer.losses)
    assert balancing > 0
    mean = np.asarray(nll)[weights == 1].mean()
    assert float(total) == pytest.approx(mean + balancing, rel=1e-5)


@pytest.mark.parametrize("num_sampled", [sets.thorough(None), 10])
@pytest.mark.parametrize("variant", [sets.slow("MoE-1-Wide"), "MoE-8"])
def test_padding_changes_neither_loss_nor_gradients_nor_metrics(
    variant, num_sampled
):
    short = markov_text(4, 6, seed=0)
    results = []
    for data in (short, padded(short, rows=2, columns=3)):
        keras.utils.set_random_seed(3)
        scorer = make(variant, num_sampled=num_sampled)
        model = scorer.language_model
        x, y, weights = data
        with tf.GradientTape() as tape:
            # Dropout and the gate's noise are drawn for padding too, so
            # their draws differ; those of the softmax do not.
            features_BLD = model.features(x["tokens"])
            nll = model.softmax(features_BLD, x["targets"], training=True)
            loss = MeanOverWords()(y, nll, weights)
        variables = [w.value for w in scorer.trainable_weights]
        gradients = tape.gradient(loss, variables, unconnected_gradients="zero")
        gradients = [np.asarray(tf.convert_to_tensor(g)) for g in gradients]
        logs = evaluate(scorer, data)
        results.append((loss, logs, gradients))
    (loss, logs, gradients), (padded_loss, padded_logs, padded_gradients) = (
        results
    )
    assert float(padded_loss) == pytest.approx(float(loss), rel=1e-5)
    assert padded_logs == pytest.approx(logs, rel=1e-5)
    for got, want in zip(padded_gradients, gradients, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-7)
    assert np.linalg.norm(gradients[0]) > 0


@pytest.mark.thorough
def test_batch_of_padding_alone_costs_nothing():
    scorer = make("MoE-8", num_sampled=10)
    nothing = np.zeros((2, 3), "int32")
    x, y, weights = as_data(nothing, nothing)
    logs = scorer.train_on_batch(x, y, weights, return_dict=True)
    assert np.isfinite(logs["loss"]) and logs["words"] == 0
    assert all(np.isfinite(w).all() for w in scorer.get_weights())


@pytest.mark.slow
def test_same_seed_trains_the_same():
    x, y, weights = markov_text(8, 6, seed=0)
    losses = []
    for _ in range(2):
        keras.utils.set_random_seed(5)
        scorer = make("MoE-8", num_sampled=10, dropout=0.3)
        history = scorer.fit(
            x, y, 4, epochs=3, sample_weight=weights, verbose=0
        )
        losses.append(history.history["loss"])
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_trains_under_xla():
    scorer = make("MoE-8", jit_compile=True, num_sampled=10)
    x, y, weights = markov_text(8, 6, seed=0)
    history = scorer.fit(x, y, 8, epochs=8, sample_weight=weights, verbose=0)
    losses = history.history["loss"]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]


@pytest.mark.slow
def test_trains_in_mixed_precision():
    x, y, weights = markov_text(64, 6, seed=0)
    results = []
    for dtype in ("float32", "mixed_bfloat16"):
        keras.utils.set_random_seed(5)
        scorer = make("MoE-8", dropout=0.0, num_sampled=10, dtype=dtype)
        history = scorer.fit(
            x, y, 16, epochs=5, sample_weight=weights, shuffle=False, verbose=0
        )
        results.append(history.history["loss"])
        assert scorer(x).dtype == tf.float32
        assert {w.dtype for w in scorer.trainable_weights} == {"float32"}
    assert results[0][-1] < results[0][0] - 0.3
    np.testing.assert_allclose(results[1], results[0], rtol=0.05)


@pytest.mark.thorough
def test_saved_scorer_goes_on_training(tmp_path):
    scorer = make("MoE-8", num_sampled=10)
    x, y, weights = data = markov_text(8, 6, seed=0)
    scorer.fit(x, y, 4, sample_weight=weights, verbose=0)
    scorer.save(tmp_path / "scorer.keras")
    loaded = keras.models.load_model(tmp_path / "scorer.keras")
    assert evaluate(loaded, data) == evaluate(scorer, data)
    loaded.fit(x, y, 4, sample_weight=weights, verbose=0)
    assert int(loaded.optimizer.iterations) == 4


def test_loss_without_weights_is_the_plain_mean():
    loss = MeanOverWords.from_config(MeanOverWords().get_config())
    nll = np.array([[1.0, 2.0], [3.0, 6.0]], "float32")
    assert float(loss(nll, nll)) == 3.0
    assert float(loss(nll, nll, np.array([[1.0, 1.0], [0.0, 0.0]]))) == 1.5
    perplexity = Perplexity()
    perplexity.update_state(nll, nll)
    assert float(perplexity.result()) == pytest.approx(np.exp(3.0))
