import keras
import numpy as np
import pytest
import tensorflow as tf

from moe_tf.decoding import language_model
from moe_tf.models.language.model import LanguageModel

# From each id, probabilities of the next; 3 ends a sequence.
CHAIN = np.array(
    [
        [0.25, 0.25, 0.25, 0.25],
        [0.0, 0.2, 0.7, 0.1],
        [0.0, 0.3, 0.1, 0.6],
        [0.0, 0.0, 0.0, 1.0],
    ]
)
END = 3


def chain_step(tokens_N, states):
    logits_VV = np.log(np.maximum(CHAIN, 1e-30)).astype("float32")
    return tf.gather(logits_VV, tokens_N), states


def sample(step=chain_step, **kwargs):
    arguments = {
        "initial_states": (),
        "num_sequences": 3,
        "start_id": 1,
        "end_id": END,
        "max_length": 20,
        "seed": 0,
    }
    return language_model.sample_text(step, **{**arguments, **kwargs})


def test_greedy_takes_the_likeliest_and_stops():
    assert sample(temperature=0) == [[2, 3]] * 3


def test_draws_as_often_as_the_step_says():
    first = [ids[0] for ids in sample(num_sequences=20_000, max_length=1)]
    share = np.bincount(first, minlength=4) / 20_000
    np.testing.assert_allclose(share, CHAIN[1], atol=0.015)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_raises_probabilities_to_its_inverse(temperature):
    ids = sample(num_sequences=20_000, max_length=1, temperature=temperature)
    share = np.bincount(np.ravel(ids), minlength=4) / 20_000
    want = CHAIN[1] ** (1 / temperature)
    np.testing.assert_allclose(share, want / want.sum(), atol=0.015)


def test_each_draw_is_from_the_row_of_the_one_before():
    pairs = np.zeros((4, 4))
    for ids in sample(num_sequences=5000):
        for before, after in zip([1, *ids], ids, strict=False):
            pairs[before, after] += 1
    for token in (1, 2):
        share = pairs[token] / pairs[token].sum()
        np.testing.assert_allclose(share, CHAIN[token], atol=0.02)
    assert pairs[END].sum() == 0


def test_sequences_end_with_the_end_or_at_the_length():
    sequences = sample(num_sequences=200, max_length=4)
    assert {len(ids) for ids in sequences} == {1, 2, 3, 4}
    for ids in sequences:
        assert END not in ids[:-1]
        assert len(ids) == 4 or ids[-1] == END


def test_same_seed_same_ids_whatever_was_drawn_between():
    first = sample(num_sequences=50, seed=4)
    keras.random.normal((3,))
    assert sample(num_sequences=50, seed=4) == first
    assert sample(num_sequences=50, seed=5) != first


def test_forbidden_ids_are_never_drawn():
    for temperature in (0, 1.0):
        sequences = sample(
            num_sequences=50, temperature=temperature, forbidden_ids=[2, 0]
        )
        assert {id for ids in sequences for id in ids} <= {1, END}


def test_states_go_from_step_to_step_and_ended_rows_read_padding():
    seen = []

    def step(tokens_N, count):
        seen.append((np.asarray(tokens_N).tolist(), count))
        # Row 0 ends at once, row 1 on the third step.
        best = [END, END if count == 2 else 1]
        return tf.one_hot(best, 4), count + 1

    got = sample(step, initial_states=0, num_sequences=2, temperature=0)
    assert got == [[END], [1, 1, END]]
    assert seen == [([1, 1], 0), ([0, 1], 1), ([0, 1], 2)]


def test_writes_with_a_language_model():
    model = LanguageModel("MoE-4", 11, width=8)
    model.build()
    model.softmax.kernel_VD.assign(4.0 * model.softmax.kernel_VD)
    step = tf.function(model.step)
    sequences = sample(
        step,
        initial_states=model.initial_states(2),
        num_sequences=2,
        temperature=0,
        forbidden_ids=(0,),
        max_length=6,
    )
    for ids in sequences:
        # Reading the text whole gives the same likeliest words.
        logits = np.array(model(np.array([[1, *ids[:-1]]])))[0]
        logits[:, 0] = -np.inf
        assert logits.argmax(-1).tolist() == ids


@pytest.mark.parametrize(
    "arguments,field",
    [
        ({"max_length": 0}, "max_length"),
        ({"num_sequences": 0}, "num_sequences"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"forbidden_ids": [4]}, "forbidden_ids"),
        ({"forbidden_ids": [-1]}, "forbidden_ids"),
        ({"forbidden_ids": range(4)}, "forbidden_ids"),
    ],
)
def test_refuses(arguments, field):
    with pytest.raises(ValueError, match=f"`{field}` must"):
        sample(**arguments)
