"""Strings to strings, against the parts done by hand."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from moe_tf.data.parallel.wordpieces import Wordpieces
from moe_tf.models.translation import factory
from moe_tf.models.translation import translator
from tests import sets
from tests import small_text


@pytest.fixture(scope="module")
def parts():
    rows = small_text.sentences()
    lines = [row[side].encode() for row in rows for side in ("en", "de")]
    wordpieces = Wordpieces.learn(lines, 150, ("de", "fr"))
    keras.utils.set_random_seed(0)
    model = factory.make_translation_model(
        "Transformer-MoE-4",
        wordpieces.size,
        width=16,
        num_heads=2,
        encoder_layers=2,
        decoder_layers=2,
        feed_forward=32,
    )
    model.build()
    return model, wordpieces


TEXTS = ["the child can find a red apple today .", "her dog", "today ."]


def greedy_by_hand(model, wordpieces, text, language, limit):
    """One sentence, one piece at a time, from whole passes."""
    source = wordpieces.encode_source([text], language).to_tensor()
    banned = [*wordpieces.control_ids, 1]
    tokens = [2]
    while len(tokens) <= limit:
        inputs = {"source": source, "tokens": tf.constant([tokens])}
        logits_V = model(inputs)[0, -1].numpy()
        logits_V[banned] = -np.inf
        tokens.append(int(logits_V.argmax()))
        if tokens[-1] == 3:
            break
    return wordpieces.decode([tokens])[0].numpy()


@pytest.mark.parametrize("language", ["de", sets.slow("fr")])
def test_greedy_equals_whole_passes_by_hand(parts, language):
    model, wordpieces = parts
    ratio = 1.0
    found = translator.Translator(
        *parts, translator.Settings(method="greedy", max_length_ratio=ratio)
    )(TEXTS, language)
    rows = wordpieces.encode_source(TEXTS, language).to_list()
    for text, row, got in zip(TEXTS, rows, found["translation"], strict=True):
        want = greedy_by_hand(model, wordpieces, text, language, len(row) + 9)
        assert got.numpy()[0] == want
    # The symbol of the language is read.
    other = translator.Translator(
        *parts, translator.Settings(method="greedy")
    ).encode(TEXTS, "de")
    assert (other[:, 0] == wordpieces.language_id("de")).numpy().all()


@pytest.mark.parametrize(
    "method", sets.split(translator.METHODS, (), ("greedy",))
)
def test_neither_the_batch_nor_padding_matters(parts, method):
    number = 1 if method == "greedy" else 2
    settings = translator.Settings(
        method=method, num_best=number, beam_size=2, coverage_penalty=0.2
    )
    translate = translator.Translator(*parts, settings)
    together = translate(TEXTS, "de")
    for index, text in enumerate(TEXTS):
        source_BS = translate.encode([text], "de")
        padded_BS = tf.pad(source_BS, [[0, 2], [0, 5]])  # and empty rows
        alone = translate.decode(translate.translate_ids(padded_BS))
        for key in ("score", "log_probability"):
            np.testing.assert_allclose(
                alone[key][0], together[key][index], rtol=1e-4
            )
        assert (
            alone["translation"][0].numpy().tolist()
            == together["translation"][index].numpy().tolist()
        )
        assert not np.isfinite(alone["score"][1:]).any()
    assert together["translation"].shape == (3, number)


@pytest.mark.thorough
def test_one_seed_one_draw(parts):
    settings = translator.Settings(method="sample", temperature=2.0)
    first = translator.Translator(*parts, settings)(TEXTS, "de")
    again = translator.Translator(*parts, settings)(TEXTS, "de")
    other = translator.Translator(*parts, settings._replace(seed=1))(
        TEXTS, "de"
    )
    texts = [found["translation"].numpy().tolist() for found in (first, again)]
    assert texts[0] == texts[1] != other["translation"].numpy().tolist()


@pytest.mark.parametrize(
    "field,value",
    [
        ("method", "best"),
        ("beam_size", 0),
        ("num_best", 5),
        ("length_penalty", -1.0),
        ("coverage_penalty", float("nan")),
        ("pruning", -0.1),
        ("max_length_ratio", 0.0),
        ("temperature", 0.0),
        ("seed", -1),
    ],
)
def test_refuses_settings(parts, field, value):
    settings = translator.Settings()._replace(**{field: value})
    with pytest.raises(ValueError, match=rf"settings\.{field}`"):
        translator.Translator(*parts, settings)


def test_an_unknown_language_is_named(parts):
    translate = translator.Translator(*parts, translator.Settings())
    with pytest.raises(ValueError, match="`language` must be one of.*'it'"):
        translate(TEXTS, "it")
