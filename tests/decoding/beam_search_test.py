import functools

import numpy as np
import pytest
import tensorflow as tf

from moe_tf.decoding import beam_search
from moe_tf.decoding import sampling
from tests import sets
from tests.decoding import tiny_translator
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
        return beam_search.search_beams(
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


def words(source_S):
    return [int(token) for token in source_S if token]


@pytest.mark.parametrize(
    "seed,alpha,beta",
    [
        *map(sets.thorough, (0, 1, 2), (0.2, 0.0, 1.0), (0.2, 0.0, 0.0)),
        (3, 0.6, 1.0),
    ],
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
        assert tiny_translator.texts(found, sentence) == [
            one.tokens for one in want
        ]
        np.testing.assert_allclose(
            found.scores_BM[sentence, :number],
            [one.score for one in want],
            rtol=1e-5,
            atol=1e-5,
        )
        assert np.all(found.scores_BM[sentence, number:] == -np.inf)


@pytest.mark.parametrize(
    "pruning,sharpness", [sets.thorough(None, 4.0), (3.0, 4.0), (0.7, 1.0)]
)
@pytest.mark.parametrize("beam_size", [1, sets.thorough(2), 4])
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
        assert tiny_translator.texts(found, sentence) == [
            one.tokens for one in want
        ]
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
    found = beam_search.search_beams(
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
        assert tiny_translator.texts(found, sentence) == [
            one.tokens for one in want
        ]


def test_what_a_sentence_gets_does_not_depend_on_the_batch_or_padding():
    _, run = compiled(num_best=3)
    source_BS = tiny_translator.sources(16, 6, SIZE, seed=3)
    lengths = np.random.default_rng(0).integers(0, 9, 16)
    together = run(np.pad(source_BS, ((0, 0), (0, 5))), lengths)
    for sentence in range(16):
        source = words(source_BS[sentence])
        alone = run([source], lengths[sentence : sentence + 1])
        assert tiny_translator.texts(alone, 0) == tiny_translator.texts(
            together, sentence
        )
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
    greedy = sampling.sample_hypotheses(
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
    assert (
        len(
            {
                tiny_translator.texts(found, sentence)[0]
                for sentence in range(20)
            }
        )
        > 3
    )
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
        assert len(set(tiny_translator.texts(found, sentence))) == 8
        assert np.all(np.diff(found.scores_BM[sentence]) <= 0)


def test_every_hypothesis_ends_and_only_once():
    _, run = compiled(beam_size=4, num_best=4, sharpness=0.5)
    found = run(tiny_translator.sources(20, 5, SIZE), np.arange(20) % 5)
    for sentence in range(20):
        got = tiny_translator.texts(found, sentence)
        assert bool(got) == bool(sentence % 5)
        for tokens in got:
            assert tokens.index(END) == len(tokens) - 1 < sentence % 5
            assert not set(tokens) & set(FORBIDDEN)
        assert found.tokens_BMI.shape[2] == found.lengths_BM.numpy().max()


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
