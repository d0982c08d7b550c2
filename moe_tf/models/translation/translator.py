"""From strings to strings: wordpieces, a translation model and its decoder."""

import typing

import tensorflow as tf

from moe_tf import checks
from moe_tf import special_ids
from moe_tf import xla
from moe_tf.decoding import beam_search
from moe_tf.decoding import sampling

METHODS = ("beam", "greedy", "sample")

# Added to every limit of length: one word may well take several pieces.
_SPARE_LENGTH = 10


class Settings(typing.NamedTuple):
    """How translations are found.

    Attributes:
        method: `"beam"`; `"greedy"`, the likeliest piece at every position;
            or `"sample"`, pieces drawn by their probability.
        beam_size: int, hypotheses alive at a time; for `"beam"`.
        num_best: int, translations returned for each sentence, at most
            `beam_size` of `"beam"`, 1 of `"greedy"`.
        length_penalty, coverage_penalty, pruning: see `beam_search.search`.
        max_length_ratio: float, most pieces of a translation for each of the
            source; 10 are added. GNMT stops at twice the source.
        temperature: float above 0, divides the logits of `"sample"`.
        seed: int, for `"sample"`: seed and sentence decide the draws, not the
            rest of the batch.

    Reference:
     - [Wu et al., 2016](https://arxiv.org/abs/1609.08144), section 7
    """

    method: str = "beam"
    beam_size: int = 4
    num_best: int = 1
    length_penalty: float = 0.2
    coverage_penalty: float = 0.2
    pruning: float | None = 3.0
    max_length_ratio: float = 2.0
    temperature: float = 1.0
    seed: int = 0

    def check(self, group="translate"):
        """Raises `ValueError` where a value cannot be used."""
        if self.method not in METHODS:
            raise ValueError(
                f"`{group}.method` must be one of {', '.join(METHODS)}. "
                f"Received: {group}.method={self.method}"
            )
        for name in ("beam_size", "num_best"):
            checks.at_least(f"{group}.{name}", getattr(self, name), 1)
        checks.at_least(f"{group}.seed", self.seed, 0)
        for name in ("length_penalty", "coverage_penalty"):
            checks.not_negative(f"{group}.{name}", getattr(self, name))
        checks.not_negative(f"{group}.pruning", self.pruning, allow_none=True)
        for name in ("max_length_ratio", "temperature"):
            checks.positive(f"{group}.{name}", getattr(self, name))
        most = {"beam": self.beam_size, "greedy": 1}.get(self.method)
        if most is not None and self.num_best > most:
            raise ValueError(
                f"`{group}.num_best` must be at most {most} with "
                f"{group}.method={self.method}, "
                f"{group}.beam_size={self.beam_size}. "
                f"Received: {group}.num_best={self.num_best}"
            )


class Translator(tf.Module):
    """Translates strings; can be saved as a program of its own.

        translator = Translator(model, wordpieces)
        translator(["A dog barks."])["translation"]
        tf.saved_model.save(translator, folder,
                            signatures={"translate": translator.serve()})

    Args:
        model: `Gnmt` or `Transformer`, built.
        wordpieces: `data.wordpieces.Wordpieces` that it was trained with.
        settings: `Settings`.

    Raises:
        ValueError: a setting cannot be used.
    """

    def __init__(self, model, wordpieces, settings=None):
        super().__init__()
        self.settings = settings or Settings()
        self.settings.check("settings")
        self.model = model
        self.wordpieces = wordpieces
        # A program that is saved has to know all that it writes to: layers
        # of experts count.
        self._counters = [
            variable.value for variable in model.metrics_variables
        ]
        self._found = tf.function(
            self._find,
            input_signature=[tf.TensorSpec((None, None), tf.int32)],
            autograph=False,
        )

    def __call__(self, texts, language=None):
        """Translates a batch.

        Args:
            texts: string `(B,)`, or a list.
            language: target language, where the wordpieces have symbols of
                several; otherwise `None`.

        Returns:
            Dict of `translation`, string `(B, M)`, `score` and
            `log_probability`, float32 `(B, M)`; `M` is `num_best`, the best
            first. Where fewer were found the rest are empty, of score `-inf`.
        """
        source_BS = self.sources(texts, language)
        return self.strings(self.find(source_BS))

    def rows(self, texts, language=None):
        """What the encoder reads of each text: ragged int32 `(B, None)`."""
        texts = tf.convert_to_tensor(texts, tf.string)
        return self.wordpieces.encode_source(texts, language)

    def sources(self, texts, language=None):
        """`rows`, padded: int32 `(B, S)`."""
        return self.rows(texts, language).to_tensor(special_ids.PAD)

    def find(self, source_BS):
        """`hypotheses.Hypotheses` of int32 `(B, S)`, in a program."""
        return self._found(source_BS)

    def strings(self, found):
        """The dictionary that a call returns, of `Hypotheses`."""
        shape = tf.shape(found.tokens_BMI)
        text_N = self.wordpieces.decode(
            tf.reshape(found.tokens_BMI, (-1, shape[2]))
        )
        return {
            "translation": tf.reshape(text_N, shape[:2]),
            "score": found.scores_BM,
            "log_probability": found.log_probabilities_BM,
        }

    def serve(self, language=None):
        """The signature `translate` of a SavedModel.

        It takes `text`, string `(B,)`, and gives what a call gives. The
        program carries the wordpieces; who loads it imports
        `tensorflow_text`, and nothing of this package.

        Args:
            language: see `__call__`.
        """

        @tf.function(
            input_signature=[tf.TensorSpec((None,), tf.string, name="text")],
            autograph=False,
        )
        def translate(text):
            return self.strings(self._find(self.sources(text, language)))

        return translate

    def _find(self, source_BS):
        with xla.in_one_piece():
            return self._search(source_BS)

    def _search(self, source_BS):
        settings = self.settings
        memory = self.model.encode(source_BS)
        pieces_B = tf.reduce_sum(
            tf.cast(source_BS != special_ids.PAD, tf.int32), axis=1
        )
        limit_B = settings.max_length_ratio * tf.cast(pieces_B, tf.float32)
        limit_B = tf.cast(tf.math.ceil(limit_B), tf.int32) + _SPARE_LENGTH
        # An empty row, which fills a batch up, needs no translation.
        limit_B = tf.where(pieces_B > 0, limit_B, 0)
        longest = tf.maximum(tf.reduce_max(limit_B), 1)
        states = self.model.initial_states(memory, longest)
        forbidden = (*self.wordpieces.control_ids, special_ids.UNK)
        common = {
            "start_id": special_ids.START,
            "end_id": special_ids.END,
            "max_length_B": limit_B,
            "forbidden_ids": forbidden,
        }
        if settings.method == "sample":
            return sampling.sample(
                self.model.step,
                memory,
                states,
                temperature=settings.temperature,
                seed=settings.seed + _fingerprints(source_BS),
                num_samples=settings.num_best,
                **common,
            )
        if settings.method == "greedy":
            beam = {"beam_size": 1, "coverage_penalty": 0.0, "pruning": None}
        else:
            beam = {
                "beam_size": settings.beam_size,
                "coverage_penalty": settings.coverage_penalty,
                "pruning": settings.pruning,
            }
        return beam_search.search(
            self.model.step,
            memory,
            states,
            memory["mask"],
            length_penalty=settings.length_penalty,
            num_best=settings.num_best,
            return_attention=True,
            **beam,
            **common,
        )


def _fingerprints(source_BS):
    """A number for each row that its padding does not change, int64 `(B,)`."""
    position_S = tf.range(tf.shape(source_BS, tf.int64)[1])
    factor_S = tf.pow(tf.constant(1_000_003, tf.int64), position_S)
    return tf.reduce_sum(tf.cast(source_BS, tf.int64) * factor_S, axis=1)
