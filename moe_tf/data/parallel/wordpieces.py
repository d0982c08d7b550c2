"""The tokenizer of translation: pieces of words, learned by SentencePiece."""

import functools
import hashlib
import importlib
import io
import itertools
import os
import random
import re
import tempfile
from collections.abc import Iterable
from collections.abc import Sequence

import numpy as np
import tensorflow as tf
from absl import logging

from moe_tf import checks
from moe_tf import files
from moe_tf import special_ids
from moe_tf.types import Tensor

# Pieces are learned from at most this many lines, a sample if there are more.
MAX_LINES = 1_000_000

# SentencePiece ignores lines of more bytes: their positions do not fit its
# integers.
_MAX_LINE_BYTES = 4192

# Single characters take up at most this fraction of the vocabulary. If the
# text has more, the rarest become unknown, but at most `_MAX_UNKNOWN` of all
# characters in the text.
_CHARACTERS = 0.5
_MAX_UNKNOWN = 0.01

# ASCII whitespace becomes a blank, and SentencePiece's own sign for a blank an
# underscore. Nothing else is changed: NFKC would write `...` for an ellipsis
# and `1/2` for a half, and no output could equal a reference with these.
_NORMALIZATION = "9\t20\nA\t20\nB\t20\nC\t20\nD\t20\n2581\t5F\n"

_LANGUAGE_SYMBOL = re.compile(r"<2(.+)>")


class Wordpieces:
    """The tokenizer: maps strings to ids of pieces and back, in graphs too.

    Ids 0 to 3 are `<pad>`, `<UNK>`, `<S>` and `</S>`. The symbols of the
    target languages, such as `<2de>`, follow, and then the pieces. The name of
    a symbol in a text is read as characters, so no text gives the id of a
    symbol. The exception is `<UNK>`, which stands for a run of unknown
    characters.

    Encoding and decoding known characters changes only whitespace: runs of
    blanks become one, tabs become blanks, and blanks at the ends are lost.

    Args:
        model: bytes of a SentencePiece model with these symbols.
    """

    def __init__(self, model: bytes) -> None:
        self.model = model

    @classmethod
    def learn(
        cls,
        lines: Iterable[bytes],
        size: int,
        languages: Sequence[str] = (),
        max_lines: int = MAX_LINES,
    ) -> "Wordpieces":
        """Learns pieces by byte-pair encoding (BPE).

        The same lines give the same model.

        Args:
            lines: sentences in UTF-8.
            size: number of ids, symbols included.
            languages: target languages that get a symbol.
            max_lines: number of lines to learn from and to hold in memory,
                a uniform sample if there are more.

        Raises:
            ImportError: a package of the extra `translation` is missing.
            ValueError: `size` does not fit the text, or no line can be used.
        """
        least = len(special_ids.SPECIALS) + len(languages) + 1
        checks.at_least("data.vocabulary_size", size, least)
        sample = _sample(lines, max_lines)
        return cls(_learn(sample, size, languages, _coverage(sample, size)))

    def save(self, path: str) -> None:
        """Writes the model, which SentencePiece's own tools read too."""
        with files.replace(path) as file:
            file.write(self.model)

    @classmethod
    def load(cls, path: str) -> "Wordpieces":
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no such model.
        """
        if not os.path.exists(path):
            raise FileNotFoundError(f"There are no wordpieces at {path}.")
        with open(path, "rb") as file:
            wordpieces = cls(file.read())
        try:
            symbols = wordpieces.pieces[: len(special_ids.SPECIALS)]
        except tf.errors.OpError as error:
            raise ValueError(
                f"{path} is not a SentencePiece model ({error.message})."
            ) from error
        if symbols != special_ids.SPECIALS:
            raise ValueError(
                f"{path} must begin with {special_ids.SPECIALS}. "
                f"Received: {symbols}"
            )
        return wordpieces

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the saved file, in hexadecimal."""
        return hashlib.sha256(self.model).hexdigest()

    @property
    def size(self) -> int:
        """Number of ids, symbols included."""
        return len(self.pieces)

    @functools.cached_property
    def pieces(self) -> tuple[str, ...]:
        """Piece of each id; a `▁` stands for a blank."""

        @tf.function(autograph=False)
        def names():
            tokenizer = self._tokenizer()
            return tokenizer.id_to_string(tf.range(tokenizer.vocab_size()))

        with tf.init_scope():
            pieces = names().numpy()
        return tuple(piece.decode("utf-8") for piece in pieces)

    @functools.cached_property
    def languages(self) -> tuple[str, ...]:
        """Target languages that have a symbol, in the order of ids."""
        # The piece after the last symbol has two characters.
        symbols = itertools.takewhile(
            _LANGUAGE_SYMBOL.fullmatch,
            self.pieces[len(special_ids.SPECIALS) :],
        )
        return tuple(symbol[2:-1] for symbol in symbols)

    @property
    def control_ids(self) -> tuple[int, ...]:
        """Ids of `<pad>`, `<S>` and languages, which no translation has."""
        first = len(special_ids.SPECIALS)
        return (
            special_ids.PAD,
            special_ids.START,
            *range(first, first + len(self.languages)),
        )

    def language_id(self, language: str) -> int:
        """Returns the id of the symbol of a target language.

        Raises:
            ValueError: the language has no symbol.
        """
        if language not in self.languages:
            raise ValueError(
                f"`language` must be one of {self.languages}. "
                f"Received: {language!r}"
            )
        return len(special_ids.SPECIALS) + self.languages.index(language)

    def encode(self, strings: Tensor | Sequence[str]) -> tf.RaggedTensor:
        """Returns the ids of each string's pieces, without symbols.

        Args:
            strings: string `(B,)`.

        Returns:
            Ragged int32 `(B, None)`.
        """
        return self._tokenize(strings)

    def encode_source(
        self, strings: Tensor | Sequence[str], language: str | None = None
    ) -> tf.RaggedTensor:
        """Returns the ids of sources: the language's symbol, pieces, `</S>`.

        Args:
            strings: string `(B,)`.
            language: target language; `None` if no language has a symbol.

        Returns:
            Ragged int32 `(B, None)`.
        """
        pieces = self.encode(strings)
        one_B1 = tf.ones_like(pieces.row_lengths(), tf.int32)[:, tf.newaxis]
        rows = [pieces, one_B1 * special_ids.END]
        if language is not None:
            rows.insert(0, one_B1 * self.language_id(language))
        return tf.concat(rows, axis=1)

    def decode(self, ids_BL: Tensor) -> Tensor:
        """Returns the text before the first `</S>`, without symbols.

        `<UNK>` becomes `⁇`.

        Args:
            ids_BL: int `(B, L)`.

        Returns:
            String `(B,)`.
        """
        ids_BL = tf.cast(ids_BL, tf.int32)
        ended_BL = (
            tf.cumsum(tf.cast(ids_BL == special_ids.END, tf.int32), axis=1) > 0
        )
        first = len(special_ids.SPECIALS) + len(self.languages)
        is_piece_BL = (ids_BL >= first) | (ids_BL == special_ids.UNK)
        kept = tf.ragged.boolean_mask(ids_BL, is_piece_BL & ~ended_BL)
        return self._detokenize(kept.values, kept.row_splits)

    def encode_lines(
        self, lines: Sequence[bytes]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encodes by Python's `sentencepiece`, twice as fast as `encode`.

        Returns:
            The ids of all lines, int32 `(T,)`, and the number of ids of each
            line, int32 `(B,)`.
        """
        rows = self._processor.encode(list(lines))
        lengths = np.fromiter(map(len, rows), np.int32, len(rows))
        ids = itertools.chain.from_iterable(rows)
        return np.fromiter(ids, np.int32, lengths.sum()), lengths

    def _tokenizer(self):
        # Made inside every graph, so that the model is an attribute of an
        # operation there, and an exported program contains it. The resource
        # of a tokenizer made outside is lost at `tf.random.set_seed`.
        text = _package("tensorflow_text")
        return text.SentencepieceTokenizer(self.model, out_type=tf.int32)

    @functools.cached_property
    def _tokenize(self):
        return tf.function(
            lambda strings: self._tokenizer().tokenize(strings),
            input_signature=[tf.TensorSpec((None,), tf.string)],
            autograph=False,
        )

    @functools.cached_property
    def _detokenize(self):
        def detokenize(ids, row_splits):
            rows = tf.RaggedTensor.from_row_splits(ids, row_splits)
            return self._tokenizer().detokenize(rows)

        return tf.function(
            detokenize,
            input_signature=[
                tf.TensorSpec((None,), tf.int32),
                tf.TensorSpec((None,), tf.int64),
            ],
            autograph=False,
        )

    @functools.cached_property
    def _processor(self):
        sentencepiece = _package("sentencepiece")
        return sentencepiece.SentencePieceProcessor(model_proto=self.model)


def _package(name):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"Wordpieces need `{name}` and what it imports ({error}). Install "
            "it with `pip install moe_tf[translation]`."
        ) from error


def _sample(lines, max_lines):
    """Draws a uniform sample of the lines that are short enough."""
    draw = random.Random(0)
    kept = []
    count = too_long = 0
    for line in lines:
        if len(line) > _MAX_LINE_BYTES:
            too_long += 1
            continue
        count += 1
        if len(kept) < max_lines:
            kept.append(line)
        elif (place := int(draw.random() * count)) < max_lines:
            kept[place] = line
    if too_long:
        logging.warning(
            "Nothing is learned from %d of %d lines that have over %d bytes",
            too_long,
            count + too_long,
            _MAX_LINE_BYTES,
        )
    if count > max_lines:
        logging.info(
            "Wordpieces: learning from %d of %d lines", max_lines, count
        )
    if not b"".join(kept).strip():
        raise ValueError(
            "There is no text to learn wordpieces from: `data.train` needs "
            f"lines of at most {_MAX_LINE_BYTES} bytes that are not blank. "
            f"Received: {count} lines, and {too_long} that are longer"
        )
    return kept


def _coverage(lines, size):
    """Returns the fraction of the text whose characters become pieces."""
    counts = np.zeros(0x110000, np.int64)
    for first in range(0, len(lines), 10_000):
        text = b"".join(lines[first : first + 10_000]).decode("utf-8")
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        counts += np.bincount(points, minlength=len(counts))
    counts[ord(" ")] = 0
    counts = np.sort(counts[counts > 0])[::-1]
    fractions = np.cumsum(counts) / counts.sum()
    needed = int(np.searchsorted(fractions, 1 - _MAX_UNKNOWN)) + 1
    num_known = max(needed, int(size * _CHARACTERS))
    if len(counts) <= num_known:
        return 1.0
    logging.warning(
        "The text has %d different characters; the rarest %d, one of %d "
        "characters of it, are unknown. A larger `data.vocabulary_size` "
        "would know more.",
        len(counts),
        len(counts) - num_known,
        round(1 / (1 - fractions[num_known - 1])),
    )
    return float(fractions[num_known - 1])


def _learn(lines, size, languages, coverage):
    sentencepiece = _package("sentencepiece")
    from sentencepiece import sentencepiece_model_pb2

    pad, unk, start, end = special_ids.SPECIALS
    model = io.BytesIO()
    with tempfile.NamedTemporaryFile("w", suffix=".tsv") as rules:
        rules.write(_NORMALIZATION)
        rules.flush()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=model,
                model_type="bpe",
                vocab_size=size,
                character_coverage=coverage,
                normalization_rule_tsv=rules.name,
                max_sentence_length=_MAX_LINE_BYTES,
                control_symbols=[f"<2{language}>" for language in languages],
                **dict(
                    pad_id=special_ids.PAD,
                    unk_id=special_ids.UNK,
                    bos_id=special_ids.START,
                    eos_id=special_ids.END,
                ),
                **dict(pad_piece=pad, unk_piece=unk),
                **dict(bos_piece=start, eos_piece=end),
                minloglevel=2,
            )
        except RuntimeError as error:
            raise _explained(error, size) from error
    # The name of the temporary file would make equal models differ.
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    proto.normalizer_spec.ClearField("normalization_rule_tsv")
    return proto.SerializeToString(deterministic=True)


def _explained(error, size):
    """Makes a `ValueError` that names the limit in SentencePiece's error."""
    if match := re.search(r"set it to a value <= (\d+)", str(error)):
        limit = f"at most {match[1]}: the text has no more pieces"
    elif match := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
        limit = f"at least {match[1]}: every character needs a piece"
    else:
        return ValueError(f"No wordpieces can be learned: {error}")
    return ValueError(
        f"`data.vocabulary_size` must be {limit}. Received: {size}"
    )
