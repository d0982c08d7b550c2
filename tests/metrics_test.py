import keras
import numpy as np
import pytest

from moe_tf.metrics import ExpertBalance
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


def balance_of(*batches):
    balance = ExpertBalance(3, name="moe")
    for batch in batches:
        balance.update_state(*(np.array(vector, "float32") for vector in batch))
    return {name: float(value) for name, value in balance.result().items()}


def test_balance_of_one_batch_is_that_of_table_6():
    load = np.array([1.0, 2.0, 6.0])
    got = balance_of([[3, 3, 3], load, [2, 2, 6], [0, 0, 5]])
    assert got == {
        "moe_cv_importance": 0.0,
        "moe_cv_load": pytest.approx(load.std() / load.mean()),
        "moe_max_over_mean_load": pytest.approx(2.0),
        "moe_dropped_fraction": pytest.approx(0.5),
    }


def test_balance_is_the_mean_over_batches_not_of_their_sum():
    # Two batches, each collapsed onto another expert, are not balanced.
    first = [[9, 0, 0], [9, 0, 0], [9, 0, 0], [0, 0, 0]]
    second = [[0, 9, 0], [0, 9, 0], [0, 9, 0], [0, 0, 0]]
    got = balance_of(first, second)
    assert got["moe_cv_load"] == pytest.approx(2**0.5)
    assert got["moe_max_over_mean_load"] == pytest.approx(3.0)


def test_balance_of_nothing_is_zero():
    zeros = [[0, 0, 0]] * 4
    assert set(balance_of().values()) == {0.0}
    assert set(balance_of(zeros).values()) == {0.0}


def test_balance_resets_and_keeps_the_last_vectors():
    balance = ExpertBalance(2, name="moe")
    vectors = [[1, 3], [2, 5], [4, 4], [0, 1]]
    balance.update_state(*np.array(vectors, "float32"))
    np.testing.assert_array_equal(np.array(balance.vectors), vectors)
    balance.reset_state()
    assert set(float(v) for v in balance.result().values()) == {0.0}
    copy = ExpertBalance.from_config(balance.get_config())
    assert copy.get_config() == balance.get_config()


def test_balance_reads_the_older_name_of_its_scalars():
    config = ExpertBalance(2, ["z_loss"]).get_config()
    older = {**config, "numbers": config["scalars"]}
    del older["scalars"]
    assert ExpertBalance.from_config(older).get_config() == config
