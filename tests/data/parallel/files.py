"""Makes small parallel corpora for the tests of `moe_tf.data`."""

import itertools

import ml_collections
import numpy as np

# Words of one letter, so that each is a piece, and words that share pieces.
WORDS = {
    "en": "the cat sat on a mat and then it ran away from me".split(),
    "de": "die katze sass auf einer matte und dann lief sie weg".split(),
    "fr": "le chat etait assis sur un tapis et puis il partit".split(),
}


def sentences(language, count, seed, longest=12):
    """Sentences that all differ, of 2 to `longest` words."""
    random = np.random.default_rng([seed, *language.encode()])
    for index in range(count):
        words = random.choice(WORDS[language], random.integers(1, longest))
        yield f"{language[0]}{index} {' '.join(words)}"


def write(folder, sizes, longest=12, seed=0):
    """Writes `<split>.<pair>.<language>` for the sizes of each pair.

    Args:
        folder: a `pathlib.Path`.
        sizes: by name of a pair, the number of sentences of each split.

    Returns:
        A `config.data` that reads them.
    """
    for pair, counts in sizes.items():
        splits = ("train", "validation", "test")
        for number, (split, count) in enumerate(
            zip(splits, counts, strict=True)
        ):
            for language in pair.split("-"):
                path = folder / f"{split}.{pair}.{language}"
                lines = sentences(language, count, [seed, number], longest)
                path.write_text("".join(f"{line}\n" for line in lines))
    return config(folder, pairs=",".join(sizes))


def config(folder, **fields):
    patterns = {
        split: f"{folder}/{split}.{{pair}}.{{lang}}"
        for split in ("train", "validation", "test")
    }
    return ml_collections.ConfigDict(
        {
            "corpus": "files",
            "path": "",
            **patterns,
            "vocabulary_size": 80,
            "max_pieces": 64,
            **fields,
        }
    )


def texts(prepared, split="train", names=None):
    """All pairs of a split as `(source, target, target language)`."""
    found = [
        [(*both, pair.target) for both in prepared.corpus.lines(pair, split)]
        for pair in prepared.corpus.pairs
        if names is None or pair.name in names
    ]
    return list(itertools.chain.from_iterable(found))
