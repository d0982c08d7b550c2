import itertools

import keras
import numpy as np
import pytest

import moe_tf
from moe_tf.evaluation import expert_words
from tests import every_router
from tests import sets

PIECES = [
    ["\u2581the", "\u2581cat", "s", "\u2581sat"],
    ["\u2581a", "\u2581cat"],
    ["\u2581die", "\u2581Katze", "n"],
]
NONE = 3  # as many experts as there are


def collected(weight_TK, expert_TK, pieces=PIECES, languages=None, **kwargs):
    words = expert_words.ExpertWords(NONE, **kwargs)
    words.add(pieces, weight_TK, expert_TK, languages)
    return words


def simple(**kwargs):
    """Expert 0 gets cats, expert 1 everything in order, expert 2 nothing."""
    weight_TK = np.zeros((12, 2))
    expert_TK = np.full((12, 2), NONE)
    weight_TK[:, 1] = np.arange(12) / 100
    expert_TK[:, 1] = 1  # padding too: it is left out by its place
    for token, weight in ((1, 0.5), (5, 0.25)):
        weight_TK[token, 0] = weight
        expert_TK[token, 0] = 0
    return collected(weight_TK, expert_TK, **kwargs)


def test_examples_are_the_highest_gate_values_in_their_context():
    words = simple(num_examples=2, context=1)
    assert words.examples(0) == [
        (0.5, ("\u2581the",), "\u2581cat", ("s",)),
        (0.25, ("\u2581a",), "\u2581cat", ()),
    ]
    assert [example[2] for example in words.examples(1)] == ["n", "\u2581Katze"]
    assert words.examples(2) == []


def test_context_ends_with_the_sequence():
    words = simple(context=2)
    first = min(words.examples(1))
    assert first == (0, (), "\u2581the", ("\u2581cat", "s"))
    assert simple(context=0).examples(0)[0][1::2] == ((), ())


def test_counts_and_importance_leave_out_padding_and_no_expert():
    words = simple()
    real = [0, 1, 2, 3, 4, 5, 8, 9, 10]
    assert words.tokens_E.tolist() == [2, 9, 0]
    np.testing.assert_allclose(words.importance_E, [0.75, sum(real) / 100, 0.0])


def test_parts_give_what_the_whole_gives_and_the_best_of_all():
    rng = np.random.default_rng(0)
    pieces = [[str(i) for i in rng.integers(0, 1000, 20)] for _ in range(60)]
    weight_TK = rng.random((1200, 2))
    expert_TK = np.argsort(rng.random((1200, NONE)))[:, :2]
    languages = [["de", "fr"][i] for i in rng.integers(0, 2, 60)]
    whole = collected(weight_TK, expert_TK, pieces, languages, num_examples=3)
    parts = expert_words.ExpertWords(NONE, num_examples=3)
    for i in range(0, 60, 7):
        tokens = slice(20 * i, 20 * (i + 7))
        parts.add(
            pieces[i : i + 7],
            weight_TK[tokens],
            expert_TK[tokens],
            languages[i : i + 7],
        )
    flat = list(itertools.chain.from_iterable(pieces))
    for expert in range(NONE):
        own_TK = np.where(expert_TK == expert, weight_TK, 0.0)
        best = np.argsort(-own_TK.max(axis=1))[:3]
        for words in (whole, parts):
            got = [
                (example.weight, example.piece)
                for example in words.examples(expert)
            ]
            want = [(own_TK[token].max(), flat[token]) for token in best]
            assert got == want
    np.testing.assert_allclose(whole.importance_E, parts.importance_E)
    np.testing.assert_allclose(
        whole.language_fractions(), parts.language_fractions()
    )
    np.testing.assert_allclose(whole.peakedness(), parts.peakedness())


def test_a_context_that_comes_again_is_shown_once_with_its_highest_value():
    pieces = [["x", "y"]] * 50
    expert_TK = np.tile([[NONE], [0]], (50, 1))
    weight_TK = np.tile(np.arange(50) % 7, (2, 1)).T.reshape(-1, 1) / 10
    words = collected(weight_TK, expert_TK, pieces, num_examples=2)
    assert words.examples(0) == [(0.6, ("x",), "y", ())]
    assert words.tokens_E[0] == 50


def test_shares_of_languages_are_those_of_the_gate_values():
    words = simple(languages=["en", "en", "de"])
    assert words.languages == ["de", "en"]
    german = 8 + 9 + 10
    np.testing.assert_allclose(
        words.language_fractions(),
        [
            [0, 1],
            [german / 42, 15 / 42],
            [0, 0],
            [german / 117, (75 + 15) / 117],
        ],
    )
    assert simple().language_fractions().shape == (4, 0)


def test_peakedness_is_the_chance_of_drawing_a_piece_twice():
    words = simple(num_examples=2)
    real = np.array([0, 1 + 5, 2, 3, 4, 8, 9, 10]) / 42
    np.testing.assert_allclose(
        words.peakedness(), [1.0, np.square(real).sum(), 0.0]
    )
    # Expert 0 has too few tokens to tell.
    assert simple(num_examples=3).peakedness()[0] == 0


def test_chooses_experts_by_importance_or_peakedness():
    words = simple(num_examples=2)
    assert words.choose(1) == [0]
    assert words.choose(5) == [0, 1]
    many = collected(
        np.ones((9, 1)), np.array([[0], *[[1]] * 5, *[[2]] * 3]),
        [list("abcdeffff")], num_examples=1,
    )  # fmt: skip
    assert many.choose(2) == [1, 2]
    assert many.choose(3, by="peakedness") == [0, 2, 1]


@pytest.mark.parametrize(
    "name", sets.split(every_router.SETTINGS, every_router.FEW)
)
def test_takes_what_is_recorded_from_every_router(name):
    layer = every_router.layer(name)
    model = keras.Sequential([layer])
    x = every_router.tokens(3, 4)
    with moe_tf.layers.recorded_gates(model) as gates:
        layer(x, mask=np.array([[1] * 4, [1, 1, 0, 0], [1, 1, 1, 0]], bool))
    ((weight_TK, expert_TK),) = gates["moe"]
    words = expert_words.ExpertWords(every_router.NUM_EXPERTS)
    words.add(PIECES, weight_TK, expert_TK)
    np.testing.assert_allclose(
        words.importance_E, layer.balance.importance_E, rtol=1e-6
    )
    np.testing.assert_array_equal(words.tokens_E, layer.balance.assigned_E)


def test_no_sequences():
    words = collected(np.zeros((0, 2)), np.zeros((0, 2), int), [])
    assert words.choose(3) == []
    assert not words.peakedness().any()


@pytest.mark.parametrize(
    "arguments,message",
    [
        ((np.zeros((12, 2)), np.zeros((12, 1), int)), "same shape"),
        ((np.zeros(12), np.zeros(12, int)), "same shape"),
        ((np.zeros((9, 1)), np.zeros((9, 1), int)), "at least 4"),
        ((np.zeros((13, 1)), np.zeros((13, 1), int)), "equally many"),
        ((np.zeros((12, 1)), np.full((12, 1), 4)), "between 0 and 3"),
        ((np.zeros((12, 1)), np.full((12, 1), -1)), "between 0 and 3"),
        (
            (np.zeros((12, 1)), np.zeros((12, 1), int), PIECES, ["de"]),
            "one for each",
        ),
    ],
)
def test_refuses_gates_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        collected(*arguments)


def test_refuses_settings():
    for field in ("num_examples", "context"):
        with pytest.raises(ValueError, match=f"`{field}` must"):
            simple(**{field: -1})
    with pytest.raises(ValueError, match="`by` must"):
        simple().choose(1, by="load")
    with pytest.raises(ValueError, match="`count` must"):
        simple().choose(0)
