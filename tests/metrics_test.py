import keras
import numpy as np
import pytest

from moe_tf.metrics import Perplexity
from moe_tf.metrics import WordCount

# Two batches of unlike size; the last words are padding.
BATCHES = [
    (np.log([[2.0, 2.0, 9.0]]), np.array([[1.0, 1.0, 0.0]])),
    (np.log([[8.0, 8.0], [8.0, 9.0]]), np.array([[1.0, 1.0], [1.0, 0.0]])),
]


def update(metric, batches=BATCHES):
    for nll, weights in batches:
        metric.update_state(np.zeros_like(nll), nll, sample_weight=weights)
    return float(metric.result())


def test_perplexity_weighs_words_alike_across_batches():
    want = (2 * 2 * 8 * 8 * 8) ** (1 / 5)
    assert update(Perplexity()) == pytest.approx(want, rel=1e-6)


def test_perplexity_of_uniform_guesses_is_the_vocabulary():
    metric = Perplexity()
    metric.update_state(np.zeros((2, 3)), np.full((2, 3), np.log(1000.0)))
    assert float(metric.result()) == pytest.approx(1000.0, rel=1e-5)


def test_weights_broadcast():
    nll = np.log([[2.0, 2.0, 2.0], [9.0, 9.0, 9.0]])
    batches = [(nll, np.array([[1.0], [0.0]]))]
    assert update(Perplexity(), batches) == pytest.approx(2.0, rel=1e-6)
    assert update(WordCount(), batches) == 3


def test_words_are_counted_without_padding():
    assert update(WordCount()) == 5
    metric = WordCount()
    metric.update_state(np.zeros((2, 3)), np.zeros((2, 3)))
    assert float(metric.result()) == 6


def test_word_count_stays_exact_over_a_large_corpus():
    # 2^24 + 1 is the first integer that float32 does not hold.
    metric = WordCount()
    for num_words in (2**18,) * (2**6 + 1) + (1,):
        ones = np.ones(num_words)
        metric.update_state(ones, ones, sample_weight=ones)
    assert int(metric.result()) == 2**24 + 2**18 + 1


@pytest.mark.parametrize("metric_class", [Perplexity, WordCount])
def test_metric_starts_anew_and_is_saved(metric_class):
    metric = metric_class()
    first = update(metric)
    metric.reset_state()
    assert update(metric) == first
    config = keras.saving.serialize_keras_object(metric)
    copy = keras.saving.deserialize_keras_object(config)
    assert copy.name == metric.name and update(copy) == first


def test_metrics_show_in_the_logs_of_evaluate():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Identity()])
    model.compile(loss="mse", weighted_metrics=[Perplexity(), WordCount()])
    nll, weights = BATCHES[0]
    logs = model.evaluate(
        nll, nll, sample_weight=weights, verbose=0, return_dict=True
    )
    assert logs["perplexity"] == pytest.approx(2.0, rel=1e-5)
    assert logs["words"] == 2
