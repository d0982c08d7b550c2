"""A small parallel text with a grammar, in English, German and French.

Real sentences, few enough words that a tiny model learns them in seconds,
with what translation has: other orders of words, articles that agree, words
that become two.
"""

import gzip
import itertools
import random

LANGUAGES = ("en", "de", "fr")

_WHO = (
    ("the child", "das Kind", "l'enfant"),
    ("the woman", "die Frau", "la femme"),
    ("my brother", "mein Bruder", "mon frère"),
    ("her dog", "ihr Hund", "son chien"),
)
_WANTS = (
    ("wants to see", "will {} sehen", "veut voir"),
    ("can find", "kann {} finden", "peut trouver"),
    ("has to eat", "muss {} essen", "doit manger"),
    ("likes to buy", "möchte {} kaufen", "aime acheter"),
)
_WHAT = (
    ("a red apple", "einen roten Apfel", "une pomme rouge"),
    ("a small house", "ein kleines Haus", "une petite maison"),
    ("the old bread", "das alte Brot", "le vieux pain"),
    ("two white fish", "zwei weiße Fische", "deux poissons blancs"),
)
_WHEN = (
    ("today", "heute", "aujourd'hui"),
    ("again", "wieder", "encore"),
    ("in the morning", "am Morgen", "le matin"),
)


def sentences(seed=0):
    """All sentences, mixed: a list of `{"en": ..., "de": ..., "fr": ...}`."""
    rows = [
        {
            "en": f"{who[0]} {wants[0]} {what[0]} {when[0]} .",
            "de": f"{who[1]} " + wants[1].format(f"{when[1]} {what[1]}") + " .",
            "fr": f"{who[2]} {wants[2]} {what[2]} {when[2]} .",
        }
        for who, wants, what, when in itertools.product(
            _WHO, _WANTS, _WHAT, _WHEN
        )
    ]
    random.Random(seed).shuffle(rows)
    return rows


def write(folder):
    """Writes `train`, `validation` and `test` of each language.

    Returns:
        dict of fields of `config.data`.
    """
    rows = sentences()
    parts = {
        "train": rows[:160],
        "validation": rows[160:176],
        "test": rows[176:],
    }
    for (split, part), language in itertools.product(parts.items(), LANGUAGES):
        text = "".join(f"{row[language]}\n" for row in part).encode()
        if split == "train":
            path = folder / f"{split}.{language}.gz"
            path.write_bytes(gzip.compress(text, mtime=0))
        else:
            (folder / f"{split}.{language}").write_bytes(text)
    return {
        "corpus": "files",
        "path": str(folder),
        "train": "{path}/train.{lang}.gz",
        "validation": "{path}/validation.{lang}",
        "test": "{path}/test.{lang}",
        "vocabulary_size": 120,
    }
