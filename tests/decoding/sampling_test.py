import functools
import math

import numpy as np
import pytest
import tensorflow as tf

from moe_tf.decoding import sampling
from tests.decoding import tiny_translator

START, END = tiny_translator.START, tiny_translator.END
SIZE = 7
# From each id, probabilities of the next.
CHAIN = np.array(
    [
        [1.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [1.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [0.0, 0.1, 0.0, 0.2, 0.6, 0.1],
        [1.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.3, 0.0, 0.7],
        [0.0, 0.0, 0.0, 0.5, 0.25, 0.25],
    ]
)


def chain_step(tokens_N, states, memory):
    with np.errstate(divide="ignore"):
        logits_VV = tf.constant(np.log(CHAIN), tf.float32)
    return tf.gather(logits_VV, tokens_N), states, None


def draws(max_length=1, step=chain_step, **settings):
    """Ints `(M, I)` and log-probabilities `(M,)` of one sentence."""
    settings = {
        "num_samples": 20_000,
        "max_length_B": [max_length],
        "start_id": START,
        "end_id": END,
        **settings,
    }
    found = sampling.sample_hypotheses(step, (), (), **settings)
    return found.tokens_BMI[0].numpy(), found.log_probabilities_BM[0].numpy()


@functools.cache
def compiled(**settings):
    translator = tiny_translator.Translator(SIZE, 5, sharpness=1.0)
    settings = {"num_samples": 2, "forbidden_ids": (0, 1, 2), **settings}

    @tf.function(reduce_retracing=True)
    def run(source_BS, max_length_B, seed):
        memory = translator.encode(source_BS)
        return sampling.sample_hypotheses(
            translator.step,
            memory,
            translator.initial_states(memory),
            start_id=START,
            end_id=END,
            max_length_B=max_length_B,
            seed=seed,
            return_attention=True,
            **settings,
        )

    return translator, run


def test_draws_as_often_as_the_step_says():
    tokens_MI, value_M = draws(max_length=2)
    share = np.bincount(tokens_MI[:, 0], minlength=6) / 20_000
    np.testing.assert_allclose(share, CHAIN[START], atol=0.015)
    follows = tokens_MI[:, 0] != END
    # The end at the last position costs what the step says.
    last = np.where(follows, CHAIN[tokens_MI[:, 0], END], 1.0)
    with np.errstate(divide="ignore"):
        want = np.log(CHAIN[START, tokens_MI[:, 0]]) + np.log(last)
    np.testing.assert_allclose(value_M, want, rtol=1e-5)
    assert (tokens_MI[follows, 1] == END).all()
    assert (tokens_MI[~follows, 1] == 0).all()


def test_each_draw_is_from_the_row_of_the_one_before():
    tokens_MI, _ = draws(max_length=3)
    for before in (4, 5):
        after = tokens_MI[tokens_MI[:, 0] == before, 1]
        share = np.bincount(after, minlength=6) / after.size
        np.testing.assert_allclose(share, CHAIN[before], atol=0.02)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_raises_probabilities_to_its_inverse(temperature):
    tokens_MI, value_M = draws(
        max_length=2, temperature=temperature, forbidden_ids=(1,)
    )
    share = np.bincount(tokens_MI[:, 0], minlength=6) / 20_000
    want = CHAIN[START] ** (1 / temperature)
    want[1] = 0.0
    np.testing.assert_allclose(share, want / want.sum(), atol=0.015)
    # Log-probabilities are the model's own.
    ends = tokens_MI[:, 0] == END
    np.testing.assert_allclose(value_M[ends], math.log(0.2), rtol=1e-5)


def test_temperature_0_takes_the_likeliest_and_of_equal_ones_the_first():
    tokens_MI, _ = draws(max_length=4, temperature=0.0, num_samples=2)
    assert tokens_MI.tolist() == [[4, 5, END]] * 2
    flat = draws(
        2,
        lambda tokens_N, states, memory: (
            tf.zeros((tf.size(tokens_N), 6)),
            states,
            None,
        ),
        temperature=0.0,
        num_samples=1,
        forbidden_ids=(0, 1),
    )
    assert flat[0].tolist() == [[2, END]]


def test_log_probabilities_and_attention_are_those_of_reading_the_text():
    translator, run = compiled()
    source_BS = tiny_translator.sources(4, 5, SIZE)
    found = run(source_BS, [6, 3, 1, 8], 5)
    np.testing.assert_array_equal(found.scores_BM, found.log_probabilities_BM)
    for sentence, sample in np.ndindex(4, 2):
        source = [int(token) for token in source_BS[sentence] if token]
        length = int(found.lengths_BM[sentence, sample])
        tokens = found.tokens_BMI[sentence, sample, :length].numpy().tolist()
        assert tokens.index(END) == length - 1
        read, value = translator.reader(source), 0.0
        for i, token in enumerate(tokens):
            log_V, attention = read(tuple(tokens[:i]))
            value += log_V[token]
        got = found.log_probabilities_BM[sentence, sample]
        assert float(got) == pytest.approx(value, rel=1e-5)
        got = found.attention_BMIS[sentence, sample].numpy()
        np.testing.assert_allclose(
            got[:length, : len(source)], attention, atol=1e-6
        )
        assert not got[length:].any()


def test_draws_depend_on_the_seed_and_not_on_the_batch():
    _, run = compiled()
    source_BS = tiny_translator.sources(6, 5, SIZE)
    lengths = np.array([8, 5, 8, 0, 8, 8])
    seeds = np.array([7, 3, 8, 1, 9, 0])
    found = run(source_BS, lengths, seeds)
    assert not found.lengths_BM[3].numpy().any()
    for sentence in (1, 2):
        alone = run(
            source_BS[sentence : sentence + 1],
            lengths[sentence : sentence + 1],
            seeds[sentence : sentence + 1],
        )
        longest = alone.tokens_BMI.shape[2]
        np.testing.assert_array_equal(
            alone.tokens_BMI[0], found.tokens_BMI[sentence, :, :longest]
        )
    again = run(source_BS, lengths, seeds)
    np.testing.assert_array_equal(again.tokens_BMI, found.tokens_BMI)
    other = run(source_BS, lengths, seeds + 1)
    assert (
        other.lengths_BM.numpy().tolist() != found.lengths_BM.numpy().tolist()
    )


def test_one_seed_gives_equal_sentences_different_draws():
    _, run = compiled(num_samples=1)
    found = run(np.full((20, 3), 5), np.full(20, 8), 0)
    assert len({tuple(row[0]) for row in found.tokens_BMI.numpy().tolist()}) > 5


def test_never_draws_a_weight_of_zero():
    weight_NV = np.array([[0.0, 1.0, 0.0, 2.0, 0.0]] * 4)
    uniform_N = np.array([0.0, 1 / 3, 1 - 2**-53, 0.2])
    got = sampling.draw_ids(tf.constant(weight_NV), uniform_N)
    assert got.numpy().tolist() == [1, 3, 3, 1]


def test_refuses_logits_with_nan():
    def step(tokens_N, states, memory):
        return tf.fill((tf.size(tokens_N), 6), math.nan), states, None

    with pytest.raises(tf.errors.InvalidArgumentError, match="NaN"):
        draws(step=step)
    # Nothing is drawn for a sentence of no length.
    tokens_MI, value_M = draws(0, step, num_samples=2)
    assert tokens_MI.shape == (2, 0)
    assert value_M.tolist() == [-math.inf] * 2


def test_refuses_to_draw_where_all_that_is_allowed_is_impossible():
    settings = {"forbidden_ids": (3, 5), "start_id": 4, "end_id": 2}
    with pytest.raises(tf.errors.InvalidArgumentError, match="probability 0"):
        draws(2, **settings)
    # At the last position there is nothing to draw.
    tokens_MI, value_M = draws(1, num_samples=1, **settings)
    assert tokens_MI.tolist() == [[2]]
    assert value_M.tolist() == [-math.inf]


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"temperature": -1.0}, "`temperature` must"),
        ({"num_samples": 0}, "`num_samples` must"),
        ({"seed": 0.5}, "`seed` must"),
        ({"seed": [[1]]}, "`seed` must"),
        ({"forbidden_ids": (END,)}, "`end_id` must"),
        ({"return_attention": True}, "return_attention=False"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        draws(**settings)
