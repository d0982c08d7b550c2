"""Translation of strings: wordpieces, a translation model and a decoder."""

import typing
from collections.abc import Callable
from collections.abc import Sequence

import tensorflow as tf

from moe_tf import checks
from moe_tf import special_ids
from moe_tf import xla
from moe_tf.decoding import beam_search
from moe_tf.decoding import sampling
from moe_tf.decoding.hypotheses import Hypotheses
from moe_tf.models.translation.base import TranslationModel
from moe_tf.types import Tensor

if typing.TYPE_CHECKING:
    from moe_tf.data.parallel.wordpieces import Wordpieces

METHODS = ("beam", "greedy", "sample")

# Added to every limit of length: one word may take several pieces.
_EXTRA_LENGTH = 10


class Settings(typing.NamedTuple):
    """Settings of decoding.

    Example:

    >>> moe_tf.models.TranslatorSettings(method="greedy").max_length_ratio
    2.0

    Attributes:
        method: `"beam"`; `"greedy"`, the likeliest piece at every position;
            or `"sample"`, pieces drawn by their probability.
        beam_size: int, hypotheses alive at a time; for `"beam"`.
        num_best: int, translations returned for each sentence, at most
            `beam_size` of `"beam"`, 1 of `"greedy"`.
        length_penalty, coverage_penalty, pruning: see `search_beams`.
        max_length_ratio: float, upper limit of a translation's length: so
            many pieces for each piece of the source, and 10 more. GNMT stops
            at twice the source.
        temperature: float above 0, divides the logits of `"sample"`.
        seed: int, for `"sample"`. The draws depend on the seed and the
            sentence, not on the rest of the batch.

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

    def check(self, group: str = "translate") -> None:
        """Raises `ValueError` if a value cannot be used.

        Args:
            group: str, name of the settings in the error. Defaults to
                `"translate"`, the trainers' group of them.
        """
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
        max_num_best = {"beam": self.beam_size, "greedy": 1}.get(self.method)
        if max_num_best is not None and self.num_best > max_num_best:
            raise ValueError(
                f"`{group}.num_best` must be at most {max_num_best} with "
                f"{group}.method={self.method}, "
                f"{group}.beam_size={self.beam_size}. "
                f"Received: {group}.num_best={self.num_best}"
            )


class Translator(tf.Module):
    """Translates strings; can be saved as a program of its own.

    Example:

    >>> from moe_tf.data.parallel.wordpieces import Wordpieces
    >>> text = [b"a dog barks", b"the dog sleeps", b"a cat sleeps"] * 9
    >>> wordpieces = Wordpieces.learn(text, 40)
    >>> model = moe_tf.models.Transformer(
    ...     "Transformer", wordpieces.size, width=8, num_heads=2,
    ...     encoder_layers=1, decoder_layers=1,
    ... )
    >>> model.build()  # And train it here.
    >>> translator = moe_tf.models.Translator(model, wordpieces)
    >>> translator(["a dog sleeps"])["translation"].shape
    TensorShape([1, 1])

    To save it, so that other programs can translate without this package:

        tf.saved_model.save(
            translator, folder, signatures={"translate": translator.serve()}
        )

    Args:
        model: `Gnmt` or `Transformer`, built.
        wordpieces: `data.parallel.wordpieces.Wordpieces` that the model was
            trained with.
        settings: `Settings`.

    Raises:
        ValueError: a setting cannot be used.
    """

    def __init__(
        self,
        model: TranslationModel,
        wordpieces: "Wordpieces",
        settings: Settings | None = None,
    ):
        super().__init__()
        self.settings = settings or Settings()
        self.settings.check("settings")
        self.model = model
        self.wordpieces = wordpieces
        # A saved program needs references to all variables that it writes,
        # the counters of MoE layers among them.
        self._counters = [
            variable.value for variable in model.metrics_variables
        ]
        self._translate_program = tf.function(
            self._translate_in_one_piece,
            input_signature=[tf.TensorSpec((None, None), tf.int32)],
            autograph=False,
        )

    def __call__(
        self, texts: Sequence[str] | tf.Tensor, language: str | None = None
    ) -> dict[str, tf.Tensor]:
        """Translates a batch.

        Args:
            texts: string `(B,)`, or a list.
            language: target language, where the wordpieces have symbols of
                several; otherwise `None`.

        Returns:
            Dict of `translation`, string `(B, M)`, `score` and
            `log_probability`, float32 `(B, M)`; `M` is `num_best`, the best
            first. Where there are fewer hypotheses, the rest are empty, of
            score `-inf`.
        """
        source_BS = self.encode(texts, language)
        return self.decode(self.translate_ids(source_BS))

    def encode_ragged(
        self, texts: Sequence[str] | tf.Tensor, language: str | None = None
    ) -> tf.RaggedTensor:
        """Returns the ids of each text, ragged int32 `(B, None)`."""
        texts = tf.convert_to_tensor(texts, tf.string)
        return self.wordpieces.encode_source(texts, language)

    def encode(
        self, texts: Sequence[str] | tf.Tensor, language: str | None = None
    ) -> tf.Tensor:
        """Returns the ids of each text, padded int32 `(B, S)`."""
        ragged = self.encode_ragged(texts, language)
        return ragged.to_tensor(special_ids.PAD)

    def translate_ids(self, source_BS: Tensor) -> Hypotheses:
        """Translates ids, int32 `(B, S)`, in one compiled program."""
        return self._translate_program(source_BS)

    def decode(self, hypotheses: Hypotheses) -> dict[str, tf.Tensor]:
        """Returns the strings and scores of `Hypotheses`, see `__call__`."""
        shape = tf.shape(hypotheses.tokens_BMI)
        text_N = self.wordpieces.decode(
            tf.reshape(hypotheses.tokens_BMI, (-1, shape[2]))
        )
        return {
            "translation": tf.reshape(text_N, shape[:2]),
            "score": hypotheses.scores_BM,
            "log_probability": hypotheses.log_probabilities_BM,
        }

    def serve(
        self, language: str | None = None
    ) -> Callable[[tf.Tensor], dict[str, tf.Tensor]]:
        """Returns the signature `translate` of a SavedModel.

        The signature takes `text`, string `(B,)`, and returns what a call
        returns. The program contains the wordpieces: to load it, import
        `tensorflow_text`; nothing of this package is needed.

        Args:
            language: see `__call__`.
        """

        @tf.function(
            input_signature=[tf.TensorSpec((None,), tf.string, name="text")],
            autograph=False,
        )
        def translate(text):
            source_BS = self.encode(text, language)
            return self.decode(self._translate_in_one_piece(source_BS))

        return translate

    def _translate_in_one_piece(self, source_BS):
        with xla.in_one_piece():
            return self._translate(source_BS)

    def _translate(self, source_BS):
        """Encodes the source and decodes with the method of the settings."""
        settings = self.settings
        memory = self.model.encode(source_BS)
        max_length_B = self._max_length(source_BS)
        longest = tf.maximum(tf.reduce_max(max_length_B), 1)
        states = self.model.initial_states(memory, longest)
        common = {
            "start_id": special_ids.START,
            "end_id": special_ids.END,
            "max_length_B": max_length_B,
            "forbidden_ids": (*self.wordpieces.control_ids, special_ids.UNK),
        }
        if settings.method == "sample":
            return sampling.sample_hypotheses(
                self.model.step,
                memory,
                states,
                temperature=settings.temperature,
                seed=settings.seed + _hash_rows(source_BS),
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
        return beam_search.search_beams(
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

    def _max_length(self, source_BS):
        """Computes the limit of each translation's length, int32 `(B,)`."""
        length_B = tf.reduce_sum(
            tf.cast(source_BS != special_ids.PAD, tf.int32), axis=1
        )
        limit_B = self.settings.max_length_ratio * tf.cast(length_B, tf.float32)
        limit_B = tf.cast(tf.math.ceil(limit_B), tf.int32) + _EXTRA_LENGTH
        # An empty row, which fills a batch up, needs no translation.
        return tf.where(length_B > 0, limit_B, 0)


def _hash_rows(source_BS):
    """Hashes each row's ids, padding aside, to int64 `(B,)`."""
    position_S = tf.range(tf.shape(source_BS, tf.int64)[1])
    factor_S = tf.pow(tf.constant(1_000_003, tf.int64), position_S)
    return tf.reduce_sum(tf.cast(source_BS, tf.int64) * factor_S, axis=1)
