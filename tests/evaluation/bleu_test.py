import collections
import math
import sys

import numpy as np
import pytest

from moe_tf.evaluation import bleu as translation_scores

TRANSLATIONS = ["the cat sat on the mat", "a dog barked", "it is raining now"]
REFERENCES = ["the cat sat on a mat", "the dog barked loudly", "it is raining"]


def counts(words, order):
    return collections.Counter(
        tuple(words[i : i + order]) for i in range(len(words) - order + 1)
    )


def bleu(translations, references):
    """Papineni et al., 2002: four precisions and the brevity penalty."""
    split = [
        (one.split(), other.split())
        for one, other in zip(translations, references, strict=True)
    ]
    logs = []
    for order in range(1, 5):
        matched = total = 0
        for one, other in split:
            matched += (counts(one, order) & counts(other, order)).total()
            total += counts(one, order).total()
        logs.append(math.log(matched / total))
    length, wanted = (sum(len(pair[i]) for pair in split) for i in (0, 1))
    brevity = min(0.0, 1 - wanted / length)
    return 100 * math.exp(np.mean(logs) + brevity)


def chrf(translations, references, beta=2):
    """F2 of the mean precision and recall of character 1- to 6-grams."""
    precisions, recalls = [], []
    for order in range(1, 7):
        matched = ours = theirs = 0
        for one, other in zip(translations, references, strict=True):
            one, other = (
                counts(text.replace(" ", ""), order) for text in (one, other)
            )
            matched += (one & other).total()
            ours, theirs = ours + one.total(), theirs + other.total()
        precisions.append(matched / ours)
        recalls.append(matched / theirs)
    precision, recall = np.mean(precisions), np.mean(recalls)
    total = beta**2 * precision + recall
    return 100 * (1 + beta**2) * precision * recall / total


def test_are_bleu_and_chrf():
    got = translation_scores.corpus_scores(TRANSLATIONS, REFERENCES)
    assert got.bleu == pytest.approx(bleu(TRANSLATIONS, REFERENCES))
    assert got.chrf == pytest.approx(chrf(TRANSLATIONS, REFERENCES))
    assert "tok:13a" in got.bleu_signature
    assert "version:" in got.chrf_signature
    assert got.bleu_interval is None


def test_short_translations_pay_the_brevity_penalty():
    short = [text.rsplit(" ", 1)[0] for text in TRANSLATIONS]
    got = translation_scores.corpus_scores(short, REFERENCES)
    length, wanted = 10, 13
    assert got.bleu == pytest.approx(bleu(short, REFERENCES))
    assert got.bleu < 100 * math.exp(1 - wanted / length)


def test_none_takes_tokens_as_they_are(caplog):
    tokenised = ["do n't stop , he said it ."] * 200
    other = ["do n't stop, he said it ."] * 200
    same = translation_scores.corpus_scores(tokenised, tokenised, "none")
    assert same.bleu == pytest.approx(100)
    assert "tok:none" in same.bleu_signature
    assert not caplog.records
    # 13a would take the comma off "stop,".
    got = translation_scores.corpus_scores(other, tokenised, "none")
    assert got.bleu == pytest.approx(bleu(other, tokenised))
    assert got.bleu < 99


def test_intervals_hold_the_score_of_a_corpus_drawn_again():
    rng = np.random.default_rng(0)
    words = np.array("a b c d e f g h i j".split())
    references = [" ".join(rng.choice(words, 12)) for _ in range(60)]
    translations = [
        " ".join(
            rng.choice(words) if rng.random() < 0.2 else word
            for word in text.split()
        )
        for text in references
    ]
    got = translation_scores.corpus_scores(
        translations, references, num_resamples=200
    )
    assert "bs:200" in got.bleu_signature
    picks = rng.integers(0, 60, (200, 60))
    drawn = [
        bleu(
            *([lines[i] for i in pick] for lines in (translations, references))
        )
        for pick in picks
    ]
    want = np.percentile(drawn, [2.5, 97.5])
    np.testing.assert_allclose(got.bleu_interval, want, atol=1.5)
    assert got.chrf_interval[0] < got.chrf < got.chrf_interval[1]


def test_nothing_in_common_scores_0():
    got = translation_scores.corpus_scores(["a"], ["b"], num_resamples=2)
    assert got[:2] == (0, 0)
    assert got.bleu_interval == (0, 0)


@pytest.mark.parametrize(
    "arguments,field",
    [
        ((["a"], []), "references"),
        (([], []), "translations"),
        ((["a"], ["a"], "moses"), "tokenize"),
        ((["a"], ["a"], "13a", -1), "num_resamples"),
        ((["a"], ["a"], "13a", 1), "num_resamples"),
    ],
)
def test_refuses(arguments, field):
    with pytest.raises(ValueError, match=f"`{field}` must|`{field}`.* must"):
        translation_scores.corpus_scores(*arguments)


def test_names_the_extra_where_sacrebleu_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(ImportError, match=r"moe_tf\[translation\]"):
        translation_scores.corpus_scores(["a"], ["a"])
