import functools
import math

import numpy as np
import pytest
import tensorflow as tf

from moe_tf import beam_search
from moe_tf import translation_sampling
from tests import tiny_translator
from tests.reference import beam_search as reference

START, END = tiny_translator.START, tiny_translator.END
FORBIDDEN = (0, 1, START)
SIZE = 7


@functools.cache
def compiled(seed=0, sharpness=3.0, **settings):
    """`(translator, function of source and max_length)`, traced once."""
    translator = tiny_translator.Translator(SIZE, 5, sharpness, seed)
    settings = {"beam_size": 3, "forbidden_ids": FORBIDDEN, **settings}

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, None], tf.int32),
            tf.TensorSpec([None], tf.int32),
        ]
    )
    def run(source_BS, max_length_B):
        memory = translator.encode(source_BS)
        return beam_search.search(
            translator.step,
            memory,
            translator.initial_states(memory),
            memory["mask"],
            start_id=START,
            end_id=END,
            max_length_B=max_length_B,
            return_attention=True,
            **settings,
        )

    return translator, run


def texts(found, sentence):
    """The tokens of a sentence's hypotheses, as tuples."""
    return [
        tuple(tokens[:length].tolist())
        for tokens, length in zip(
            found.tokens_BMI[sentence].numpy(),
            found.lengths_BM[sentence].numpy(),
            strict=True,
        )
        if length
    ]


def words(source_S):
    return [int(token) for token in source_S if token]


def table_search(table_VV, max_length_B, **settings):
    """Searches where the last token alone decides about the next."""
    logits_VV = tf.constant(table_VV, tf.float32)
    settings = {"coverage_penalty": 0.0, "forbidden_ids": (), **settings}
    return beam_search.search(
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


@pytest.mark.parametrize(
    "seed,alpha,beta",
    [(0, 0.2, 0.2), (1, 0.0, 0.0), (2, 1.0, 0.0), (3, 0.6, 1.0)],
)
def test_a_beam_that_holds_everything_finds_the_best_of_all(seed, alpha, beta):
    # 3 words and the end: 40 hypotheses of at most 4 tokens.
    translator, run = compiled(
        seed,
        2.0,
        beam_size=100,
        pruning=None,
        num_best=40,
        length_penalty=alpha,
        coverage_penalty=beta,
    )
    source_BS = tiny_translator.sources(2, 4, SIZE, seed)
    found = run(source_BS, [4, 3])
    for sentence, max_length in enumerate([4, 3]):
        follow = translator.reader(words(source_BS[sentence]))
        want = reference.exhaustive(
            follow, END, range(4, SIZE), max_length, alpha, beta
        )
        number = (3**max_length - 1) // 2
        assert len(want) == number
        assert texts(found, sentence) == [one.tokens for one in want]
        np.testing.assert_allclose(
            found.scores_BM[sentence, :number],
            [one.score for one in want],
            rtol=1e-5,
            atol=1e-5,
        )
        assert np.all(found.scores_BM[sentence, number:] == -np.inf)


@pytest.mark.parametrize(
    "pruning,sharpness", [(None, 4.0), (3.0, 4.0), (0.7, 1.0)]
)
@pytest.mark.parametrize("beam_size", [1, 2, 4])
def test_matches_one_hypothesis_at_a_time(beam_size, pruning, sharpness):
    seed = beam_size
    translator, run = compiled(
        seed, sharpness, beam_size=beam_size, pruning=pruning,
        num_best=beam_size,
    )  # fmt: skip
    source_BS = tiny_translator.sources(5, 5, SIZE, seed)
    lengths = [6, 3, 1, 8, 5]
    found = run(source_BS, lengths)
    for sentence, max_length in enumerate(lengths):
        source = words(source_BS[sentence])
        want = reference.search(
            translator.reader(source),
            END,
            beam_size,
            max_length,
            pruning=pruning,
            num_best=beam_size,
            forbidden_ids=FORBIDDEN,
        )
        assert texts(found, sentence) == [one.tokens for one in want]
        for rank, one in enumerate(want):
            got = [tensor[sentence, rank].numpy() for tensor in found[2:]]
            assert got[0] == pytest.approx(one.score, rel=1e-5, abs=1e-5)
            assert got[1] == pytest.approx(one.log_probability, abs=1e-5)
            np.testing.assert_allclose(
                got[2][: len(one.tokens), : len(source)],
                one.attention,
                atol=1e-6,
            )
            assert not got[2][len(one.tokens) :].any()
            assert not got[2][:, len(source) :].any()


def test_matches_one_hypothesis_at_a_time_with_many_words():
    translator = tiny_translator.Translator(1000, 5, sharpness=4.0)
    source_BS = tiny_translator.sources(2, 4, 1000)
    memory = translator.encode(source_BS)
    settings = {"beam_size": 3, "num_best": 3, "forbidden_ids": FORBIDDEN}
    found = beam_search.search(
        translator.step, memory, translator.initial_states(memory),
        memory["mask"], start_id=START, end_id=END, max_length_B=[5, 5],
        **settings,
    )  # fmt: skip
    for sentence in range(2):
        want = reference.search(
            translator.reader(words(source_BS[sentence])),
            END,
            max_length=5,
            **settings,
        )
        assert texts(found, sentence) == [one.tokens for one in want]


def test_what_a_sentence_gets_does_not_depend_on_the_batch_or_padding():
    _, run = compiled(num_best=3)
    source_BS = tiny_translator.sources(16, 6, SIZE, seed=3)
    lengths = np.random.default_rng(0).integers(0, 9, 16)
    together = run(np.pad(source_BS, ((0, 0), (0, 5))), lengths)
    for sentence in range(16):
        source = words(source_BS[sentence])
        alone = run([source], lengths[sentence : sentence + 1])
        assert texts(alone, 0) == texts(together, sentence)
        np.testing.assert_allclose(
            alone.scores_BM[0], together.scores_BM[sentence], rtol=1e-5
        )
        longest = alone.tokens_BMI.shape[2]
        np.testing.assert_allclose(
            alone.attention_BMIS[0],
            together.attention_BMIS[sentence, :, :longest, : len(source)],
            atol=1e-6,
        )


def test_a_beam_of_one_without_pruning_is_greedy():
    translator, run = compiled(
        beam_size=1, pruning=None, length_penalty=0.0, coverage_penalty=0.0
    )
    source_BS = tiny_translator.sources(20, 5, SIZE)
    lengths = np.full(20, 9)
    found = run(source_BS, lengths)
    memory = translator.encode(source_BS)
    greedy = translation_sampling.sample(
        translator.step,
        memory,
        translator.initial_states(memory),
        start_id=START,
        end_id=END,
        max_length_B=lengths,
        temperature=0.0,
        forbidden_ids=FORBIDDEN,
        return_attention=True,
    )
    assert len({texts(found, sentence)[0] for sentence in range(20)}) > 3
    for got, want in zip(found, greedy, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_a_wider_beam_scores_higher_on_average():
    source_BS = tiny_translator.sources(40, 6, SIZE)
    narrow, wide = (
        np.mean(compiled(**settings)[1](source_BS, np.full(40, 9)).scores_BM)
        for settings in ({"beam_size": 1}, {"beam_size": 8, "num_best": 1})
    )
    assert narrow < wide


def test_hypotheses_are_all_different_and_the_best_first():
    _, run = compiled(beam_size=8, num_best=8, pruning=None)
    found = run(tiny_translator.sources(6, 5, SIZE), np.full(6, 7))
    for sentence in range(6):
        assert len(set(texts(found, sentence))) == 8
        assert np.all(np.diff(found.scores_BM[sentence]) <= 0)


def test_every_hypothesis_ends_and_only_once():
    _, run = compiled(beam_size=4, num_best=4, sharpness=0.5)
    found = run(tiny_translator.sources(20, 5, SIZE), np.arange(20) % 5)
    for sentence in range(20):
        got = texts(found, sentence)
        assert bool(got) == bool(sentence % 5)
        for tokens in got:
            assert tokens.index(END) == len(tokens) - 1 < sentence % 5
            assert not set(tokens) & set(FORBIDDEN)
        assert found.tokens_BMI.shape[2] == found.lengths_BM.numpy().max()


def test_probabilities_stay_those_of_the_model_with_forbidden_ids():
    # 4 is likeliest but forbidden; 5 does not inherit its share.
    row = [0.01, 0.01, 0.01, 0.17, 0.5, 0.3]
    found = table_search(
        log(*[row] * 6), [2], beam_size=2, forbidden_ids=(0, 1, 2, 4),
        num_best=2, length_penalty=0.0, pruning=None,
    )  # fmt: skip
    assert texts(found, 0) == [(END,), (5, END)]
    np.testing.assert_allclose(
        found.log_probabilities_BM[0], np.log([0.17, 0.3 * 0.17]), rtol=1e-5
    )


def test_at_the_last_position_the_end_costs_what_the_model_says():
    row = [0, 0, 0, 1e-6, 0.7, 0.3 - 1e-6]
    found = table_search(log(*[row] * 6), [3], beam_size=2, length_penalty=0.0)
    assert texts(found, 0) == [(4, 4, END)]
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
    assert texts(kept, 0) == [(5, END), (4, END), (4, 4, END)]
    # The end at the last position is the only token, so none is better.
    cut = table_search(rows, [3], pruning=3.0, **settings)
    assert texts(cut, 0) == [(5, END), (4, 4, END)]


def test_finished_hypotheses_far_below_the_best_are_dropped():
    rows = np.full((6, 6), -np.inf)
    rows[START, [END, 4]] = np.log([0.6, 0.4])
    rows[4, [5, END]] = np.log([0.5, 0.5])
    rows[5, END] = 0.0
    settings = {"beam_size": 3, "num_best": 3, "length_penalty": 0.0}
    # Scores log(0.6), log(0.2), log(0.2): 1.0986 apart.
    assert len(texts(table_search(rows, [3], pruning=1.2, **settings), 0)) == 3
    cut = table_search(rows, [3], pruning=1.0, **settings)
    assert texts(cut, 0) == [(END,)]
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
        assert texts(found, sentence) == want


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
    beam_search.search(step, (), (), max_length_B=[50, 0], **arguments)
    # log(0.1) is below log(0.9): nothing that goes on can win.
    assert step.fed == [[START, PAD, PAD, PAD]]
    step = CountingStep(rows)
    beam_search.search(
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
    assert texts(table_search(rows, [1], beam_size=4), 0) == [(END,)]


def test_attention_that_underflows_leaves_the_score_finite():
    def step(tokens_N, states, memory):
        attention_NS = tf.one_hot(tf.zeros_like(tokens_N), 3)
        return tf.zeros((tf.size(tokens_N), 6)), states, attention_NS

    found = beam_search.search(
        step, (), (), tf.constant([[True, True, False]]), beam_size=2,
        start_id=START, end_id=END, max_length_B=[1], length_penalty=0.0,
    )  # fmt: skip
    want = math.log(1 / 6) + 0.2 * math.log(1e-10)
    np.testing.assert_allclose(found.scores_BM, [[want]], rtol=1e-5)


def test_no_sentences():
    _, run = compiled(num_best=3)
    found = run(np.zeros((0, 4)), np.zeros(0))
    assert found.tokens_BMI.shape == (0, 3, 0)
    assert found.attention_BMIS.shape == (0, 3, 0, 4)


def test_a_saved_program_answers_the_same(tmp_path):
    _, run = compiled(num_best=3)
    module = tf.Module()
    module.translate = run
    tf.saved_model.save(module, tmp_path)
    source_BS = tiny_translator.sources(4, 5, SIZE)
    again = tf.saved_model.load(tmp_path).translate(
        tf.constant(source_BS, tf.int32), tf.constant([5, 6, 7, 2])
    )
    for got, want in zip(again, run(source_BS, [5, 6, 7, 2]), strict=True):
        np.testing.assert_array_equal(got, want)


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
        beam_search.search(step, **arguments)


def test_refuses_lengths_and_rows_that_do_not_fit():
    arguments = {"start_id": START, "end_id": END, "coverage_penalty": 0.0}
    with pytest.raises(tf.errors.InvalidArgumentError, match="one row for"):
        beam_search.search(
            None, tf.zeros((2, 3)), (), beam_size=1, max_length_B=[3],
            **arguments,
        )  # fmt: skip
    with pytest.raises(tf.errors.InvalidArgumentError, match="negative"):
        table_search(np.zeros((6, 6)), [3, -1], beam_size=2)
