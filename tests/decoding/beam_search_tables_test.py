"""Beam search where a table says what follows a token, worked out by hand."""

import math

import numpy as np
import pytest
import tensorflow as tf

from moe_tf.decoding import beam_search
from tests.decoding import tiny_translator

START, END = tiny_translator.START, tiny_translator.END


def table_search(table_VV, max_length_B, **settings):
    """Searches where the last token alone decides about the next."""
    logits_VV = tf.constant(table_VV, tf.float32)
    settings = {"coverage_penalty": 0.0, "forbidden_ids": (), **settings}
    return beam_search.search_beams(
        lambda tokens_N, states, memory: (
            tf.gather(logits_VV, tokens_N),
            states,
            None,
        ),
        (),
        (),
        start_id=START,
        end_id=END,
        max_length_B=np.array(max_length_B),
        **settings,
    )


def log(*rows):
    with np.errstate(divide="ignore"):
        return np.log(np.array(rows))


def test_probabilities_stay_those_of_the_model_with_forbidden_ids():
    # 4 is likeliest but forbidden; 5 does not inherit its share.
    row = [0.01, 0.01, 0.01, 0.17, 0.5, 0.3]
    found = table_search(
        log(*[row] * 6), [2], beam_size=2, forbidden_ids=(0, 1, 2, 4),
        num_best=2, length_penalty=0.0, pruning=None,
    )  # fmt: skip
    assert tiny_translator.texts(found, 0) == [(END,), (5, END)]
    np.testing.assert_allclose(
        found.log_probabilities_BM[0], np.log([0.17, 0.3 * 0.17]), rtol=1e-5
    )


def test_at_the_last_position_the_end_costs_what_the_model_says():
    row = [0, 0, 0, 1e-6, 0.7, 0.3 - 1e-6]
    found = table_search(log(*[row] * 6), [3], beam_size=2, length_penalty=0.0)
    assert tiny_translator.texts(found, 0) == [(4, 4, END)]
    np.testing.assert_allclose(
        found.scores_BM[0], [math.log(0.7 * 0.7 * 1e-6)], rtol=1e-5
    )


def test_no_hypothesis_where_the_end_is_impossible():
    row = [0, 0, 0, 0, 0.7, 0.3]
    found = table_search(
        log(*[row] * 6), [3, 1], beam_size=2, num_best=2, pruning=None
    )
    assert found.tokens_BMI.shape == (2, 2, 0)
    assert not found.lengths_BM.numpy().any()
    assert np.all(found.scores_BM == -np.inf)
    assert np.all(found.log_probabilities_BM == -np.inf)
    assert found.attention_BMIS is None


def test_tokens_far_below_the_best_of_their_hypothesis_are_dropped():
    # After 4 the end is exp(-3.1) times as likely as 4, after 5 certain.
    rows = np.full((6, 6), -np.inf)
    rows[START, [4, 5]] = np.log([0.8, 0.2])
    rows[4, [4, END]] = [0.0, -3.1]
    rows[5, END] = 0.0
    settings = {"beam_size": 4, "num_best": 4, "length_penalty": 0.0}
    kept = table_search(rows, [3], pruning=3.2, **settings)
    assert tiny_translator.texts(kept, 0) == [(5, END), (4, END), (4, 4, END)]
    # The end at the last position is the only token, so none is better.
    cut = table_search(rows, [3], pruning=3.0, **settings)
    assert tiny_translator.texts(cut, 0) == [(5, END), (4, 4, END)]


def test_finished_hypotheses_far_below_the_best_are_dropped():
    rows = np.full((6, 6), -np.inf)
    rows[START, [END, 4]] = np.log([0.6, 0.4])
    rows[4, [5, END]] = np.log([0.5, 0.5])
    rows[5, END] = 0.0
    settings = {"beam_size": 3, "num_best": 3, "length_penalty": 0.0}
    # Scores log(0.6), log(0.2), log(0.2): 1.0986 apart.
    assert (
        len(
            tiny_translator.texts(
                table_search(rows, [3], pruning=1.2, **settings), 0
            )
        )
        == 3
    )
    cut = table_search(rows, [3], pruning=1.0, **settings)
    assert tiny_translator.texts(cut, 0) == [(END,)]
    assert cut.lengths_BM.numpy().tolist() == [[1, 0, 0]]
    assert cut.scores_BM.numpy()[0, 1:].tolist() == [-math.inf] * 2
    assert cut.tokens_BMI.numpy()[0].tolist() == [[END], [0], [0]]


def test_equal_hypotheses_come_in_the_order_of_their_ids():
    found = table_search(
        np.zeros((6, 6)), [3, 3], beam_size=6, num_best=6, length_penalty=0.0,
        forbidden_ids=(0, 1, 2), pruning=None,
    )  # fmt: skip
    want = [(END,), (4, END), (5, END), (4, 4, END), (4, 5, END), (5, 4, END)]
    for sentence in range(2):
        assert tiny_translator.texts(found, sentence) == want


class CountingStep:
    """Rows of a table; counts its calls and keeps what it was fed."""

    def __init__(self, rows):
        self.logits_VV = tf.constant(rows, tf.float32)
        self.fed = []

    def __call__(self, tokens_N, states, memory):
        self.fed.append(tokens_N.numpy().tolist())
        return tf.gather(self.logits_VV, tokens_N), states, None


def test_stops_when_no_live_hypothesis_can_win_and_feeds_padding_before():
    rows = np.full((6, 6), -20.0)
    rows[START, [END, 4]] = np.log([0.9, 0.1])
    rows[4, [4, 5]] = np.log([0.5, 0.5])
    rows[5, 4] = 0.0
    rows[[PAD := 0, 1]] = np.nan  # what padding gets does not matter
    arguments = {
        "start_id": START,
        "end_id": END,
        "beam_size": 2,
        "coverage_penalty": 0.0,
        "length_penalty": 0.0,
    }
    step = CountingStep(rows)
    beam_search.search_beams(step, (), (), max_length_B=[50, 0], **arguments)
    # log(0.1) is below log(0.9): nothing that goes on can win.
    assert step.fed == [[START, PAD, PAD, PAD]]
    step = CountingStep(rows)
    beam_search.search_beams(
        step, (), (), max_length_B=[50, 3], **{**arguments, "num_best": 2},
        pruning=4.0,
    )  # fmt: skip
    # A second best may be 4.0 below the best; those that live soon are not.
    assert 2 < len(step.fed) < 10
    assert step.fed[3][2:] == [PAD, PAD]


def test_refuses_logits_with_nan_where_a_hypothesis_lives():
    rows = np.zeros((6, 6))
    rows[4, 5] = np.nan
    with pytest.raises(tf.errors.InvalidArgumentError, match="NaN"):
        table_search(rows, [4], beam_size=4)
    rows[4, 5] = np.inf
    with pytest.raises(tf.errors.InvalidArgumentError, match="infinity"):
        table_search(rows, [4], beam_size=4)
    # One position: 4 is never read.
    assert tiny_translator.texts(table_search(rows, [1], beam_size=4), 0) == [
        (END,)
    ]


def test_attention_that_underflows_leaves_the_score_finite():
    def step(tokens_N, states, memory):
        attention_NS = tf.one_hot(tf.zeros_like(tokens_N), 3)
        return tf.zeros((tf.size(tokens_N), 6)), states, attention_NS

    found = beam_search.search_beams(
        step, (), (), tf.constant([[True, True, False]]), beam_size=2,
        start_id=START, end_id=END, max_length_B=[1], length_penalty=0.0,
    )  # fmt: skip
    want = math.log(1 / 6) + 0.2 * math.log(1e-10)
    np.testing.assert_allclose(found.scores_BM, [[want]], rtol=1e-5)


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"beam_size": 0}, "`beam_size` must"),
        ({"num_best": 3}, "`num_best` must be at most `beam_size`"),
        ({"num_best": 0}, "`num_best` must"),
        ({"length_penalty": -0.1}, "`length_penalty` must"),
        ({"coverage_penalty": -0.1}, "`coverage_penalty` must"),
        ({"coverage_penalty": 0.1}, "`coverage_penalty` needs `source_mask"),
        ({"pruning": -1.0}, "`pruning` must"),
        ({"forbidden_ids": (6,)}, "`forbidden_ids` must be in"),
        ({"forbidden_ids": (END,)}, "`end_id` must"),
        ({"end_id": 6}, "`end_id` must"),
        ({"return_attention": True}, "return_attention=False"),
        ({"max_length_B": 3}, "`max_length_B` must"),
        ({"max_length_B": [0.5]}, "`max_length_B` must"),
        ({"states": tf.zeros(())}, "whose first axis"),
    ],
)
def test_refuses(settings, message):
    def step(tokens_N, states, memory):
        return tf.zeros((tf.size(tokens_N), 6)), states, None

    arguments = {
        "beam_size": 2,
        "start_id": START,
        "end_id": END,
        "max_length_B": [3],
        "coverage_penalty": 0.0,
        "memory": (),
        "states": (),
        **settings,
    }
    with pytest.raises(ValueError, match=message):
        beam_search.search_beams(step, **arguments)


def test_refuses_lengths_and_rows_that_do_not_fit():
    arguments = {"start_id": START, "end_id": END, "coverage_penalty": 0.0}
    with pytest.raises(tf.errors.InvalidArgumentError, match="one row for"):
        beam_search.search_beams(
            None, tf.zeros((2, 3)), (), beam_size=1, max_length_B=[3],
            **arguments,
        )  # fmt: skip
    with pytest.raises(tf.errors.InvalidArgumentError, match="negative"):
        table_search(np.zeros((6, 6)), [3, -1], beam_size=2)
