"""The vocabulary of a language model: words and their ids."""

import collections
import functools
import hashlib
import os
from collections.abc import Iterable
from collections.abc import Mapping

import tensorflow as tf
from absl import logging

from moe_tf import files
from moe_tf import special_ids
from moe_tf.types import Tensor


class Vocabulary:
    """Maps words to ids and back.

    Ids 0 to 3 are `<pad>`, `<UNK>`, `<S>` and `</S>`. Words follow by
    decreasing count, and by their bytes if counts are equal: a log-uniform
    sampler needs ids in the order of falling frequency. Other words map to
    `<UNK>`, and so do the names of the four specials in a text.

    Args:
        words: str, the words from id 4 on.
    """

    def __init__(self, words: Iterable[str]) -> None:
        self.words = special_ids.SPECIALS + tuple(words)

    @classmethod
    def build(cls, lines: Iterable[bytes], size: int) -> "Vocabulary":
        """Makes a vocabulary of the most frequent words of `lines`.

        Args:
            lines: sentences in UTF-8, words separated by ASCII whitespace.
            size: maximal number of ids, the four specials included.

        Raises:
            ValueError: `size` leaves no room for a word.
        """
        counts = collections.Counter()
        for line in lines:
            counts.update(line.split())
        return cls.from_counts(counts, size)

    @classmethod
    def from_counts(
        cls, counts: Mapping[bytes, int], size: int
    ) -> "Vocabulary":
        """Makes a vocabulary of the most frequent words.

        Args:
            counts: number of occurrences by word.
            size: maximal number of ids, the four specials included.

        Raises:
            ValueError: `size` leaves no room for a word.
        """
        if size <= len(special_ids.SPECIALS):
            raise ValueError(
                "`data.vocabulary_size` must be over "
                f"{len(special_ids.SPECIALS)}, the "
                f"number of special symbols. Received: {size}"
            )
        specials = {special.encode() for special in special_ids.SPECIALS}
        ranked = sorted(
            (word for word in counts if word not in specials),
            key=lambda word: (-counts[word], word),
        )
        vocabulary = cls(
            word.decode("utf-8")
            for word in ranked[: size - len(special_ids.SPECIALS)]
        )
        if vocabulary.size < size:
            logging.warning(
                "The text has only %d different words: the vocabulary has %d "
                "entries instead of `data.vocabulary_size`=%d",
                len(ranked),
                vocabulary.size,
                size,
            )
        return vocabulary

    @property
    def size(self) -> int:
        """Number of ids, the four specials included."""
        return len(self.words)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the saved file, in hexadecimal."""
        return hashlib.sha256(self._bytes()).hexdigest()

    def save(self, path: str) -> None:
        """Writes one word a line, in UTF-8; the line number is the id + 1."""
        with files.replace(path) as file:
            file.write(self._bytes())

    @classmethod
    def load(cls, path: str) -> "Vocabulary":
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a vocabulary; the message has the
                path, the line and what is wrong.
        """
        if not os.path.exists(path):
            raise FileNotFoundError(f"There is no vocabulary at {path}.")
        with open(path, "rb") as file:
            rows = file.read().removesuffix(b"\n").split(b"\n")
        words = []
        first_line = {}
        for number, row in enumerate(rows, start=1):
            words.append(_checked_word(row, number, first_line, path))
        if len(words) <= len(special_ids.SPECIALS):
            raise ValueError(
                f"{path} must have at least one word after "
                f"{', '.join(special_ids.SPECIALS)}. "
                f"Received: {len(words)} lines"
            )
        return cls(words[len(special_ids.SPECIALS) :])

    def encode(
        self, words: Tensor | tf.RaggedTensor
    ) -> tf.Tensor | tf.RaggedTensor:
        """Looks up the ids of words, also inside `tf.data`.

        Args:
            words: string tensor or ragged tensor of any shape.

        Returns:
            int32 ids of the same shape.
        """
        return self._table.lookup(words)

    def decode(self, ids: Iterable[int]) -> list[str]:
        """Returns the word of each id, and the names of specials.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.size:
                raise ValueError(
                    f"`ids` must be between 0 and {self.size - 1}. "
                    f"Received: {i}"
                )
        return [self.words[i] for i in ids]

    def sentence(self, ids: Iterable[int]) -> str:
        """Returns the words before `</S>`, without `<S>` and padding."""
        ids = [int(i) for i in ids]
        if special_ids.END in ids:
            ids = ids[: ids.index(special_ids.END)]
        return " ".join(
            self.decode(
                i for i in ids if i not in (special_ids.PAD, special_ids.START)
            )
        )

    def __contains__(self, word: bytes) -> bool:
        return word in self._known

    @functools.cached_property
    def _known(self):
        return {
            word.encode() for word in self.words[len(special_ids.SPECIALS) :]
        }

    @functools.cached_property
    def _table(self):
        # Made once, on the CPU, and outside of any graph being traced.
        with tf.init_scope(), tf.device("CPU:0"):
            keys = tf.constant(
                self.words[len(special_ids.SPECIALS) :], tf.string
            )
            ids = tf.range(len(special_ids.SPECIALS), self.size, dtype=tf.int32)
            return tf.lookup.StaticHashTable(
                tf.lookup.KeyValueTensorInitializer(keys, ids),
                default_value=special_ids.UNK,
            )

    def _bytes(self) -> bytes:
        return "".join(f"{word}\n" for word in self.words).encode()


def _checked_word(row, number, first_line, path) -> str:
    """Decodes a line of a vocabulary and remembers it in `first_line`."""
    place = f"{path}, line {number}"
    try:
        word = row.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8. Received: {row!r}") from error
    if (
        number <= len(special_ids.SPECIALS)
        and word != special_ids.SPECIALS[number - 1]
    ):
        raise ValueError(
            f"{place}: must be {special_ids.SPECIALS[number - 1]}. "
            f"Received: {word!r}"
        )
    if row.split() != [row]:
        raise ValueError(
            f"{place}: must be one word without whitespace. Received: {word!r}"
        )
    if word in first_line:
        raise ValueError(
            f"{place}: repeats line {first_line[word]}. Received: {word!r}"
        )
    first_line[word] = number
    return word
