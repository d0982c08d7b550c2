"""Translation: model, data and loss together from a config."""

import functools
import itertools
from typing import Any

import keras
import tensorflow as tf

from moe_tf import checks
from moe_tf import schedules
from moe_tf import xla
from moe_tf.data.parallel import batching
from moe_tf.data.parallel import preparation
from moe_tf.evaluation import bleu
from moe_tf.models.translation import factory
from moe_tf.models.translation import translator
from moe_tf.models.translation import variants
from moe_tf.models.translation.scorer import TranslationScorer
from moe_tf.training import compiled_updates
from moe_tf.training import config_checks
from moe_tf.training import meshes
from moe_tf.training.board import TrainingBoard
from moe_tf.training.task import Task
from moe_tf.training.translation import batch_translate
from moe_tf.training.translation import dry_run
from moe_tf.training.translation.callbacks import ValidationTranslations

CHECKPOINTS = ("best", "last", "average")
OUTPUTS = ("text", "json")


class TranslationTask(Task):
    """Translating sentences, of one pair of languages or of several.

    `configs/mt_demo.py` explains each field of the config.

    Raises:
        ValueError: a field's value cannot be used.
    """

    free_fields = (*Task.free_fields, "translate", "experts")

    def check_config(self) -> None:
        """Refuses a config that cannot be used, before any work is done."""
        _check(self.config)
        self.settings.check()
        # Makes the model, without weights, so that wrong settings tell.
        meshes.check_mesh(self.config, self.variant().layers)

    @property
    def settings(self) -> translator.Settings:
        """The decoder's settings."""
        names = translator.Settings._fields
        return translator.Settings(
            **{name: self.config.translate[name] for name in names}
        )

    def variant(self) -> variants.Variant:
        """Describes the model's layers without building them."""
        model = self._make_model(vocabulary_size=8)
        return model.variant

    def dry_run_report(self) -> str:
        """Returns what the run holds and costs; allocates nothing."""
        return dry_run.format_report(self.variant(), self.config)

    def prepare(self, workdir: str) -> preparation.PreparedPairs:
        """Reads the corpus and splits it into wordpieces."""
        return preparation.prepare_pairs(self.config.data, workdir)

    def data_report(self, prepared: preparation.PreparedPairs) -> list[str]:
        """Returns a line for each pair and split, and one for the passes."""
        lines = []
        for split, by_pair in prepared.statistics.items():
            for name, counts in by_pair.items():
                skipped = sum(counts.skipped.values())
                lines.append(
                    f"{split} {name}: {counts.pairs:,} sentence pairs, "
                    f"{counts.source_pieces:,} source and "
                    f"{counts.target_pieces:,} target wordpieces with ends, "
                    f"{counts.unknown_pieces:,} unknown, {skipped:,} skipped"
                )
        data, steps = self.config.data, self.config.train.steps
        passes = steps / batching.batches_in_first_pass(
            prepared,
            data.batch_tokens,
            self.config.seed,
            rows_multiple=data.rows_multiple,
        )
        lines.append(f"{steps:,} steps are {passes:.2f} passes over train")
        return lines

    def pair(self, prepared: preparation.PreparedPairs) -> Any:
        """Returns the language pair that `translate.pair` names."""
        name = self.config.translate.pair
        if not name:
            return prepared.corpus.pairs[0]
        return prepared.corpus.pair(name)

    def language(
        self, prepared: preparation.PreparedPairs, pair: Any
    ) -> str | None:
        """Returns the target language to name; None if there is one only."""
        return pair.target if prepared.wordpieces.languages else None

    def texts(
        self,
        prepared: preparation.PreparedPairs,
        split: str,
        pair: Any,
        number: int | None = None,
    ) -> list[list[str]]:
        """Returns the first sources and references of a split."""
        rows = itertools.islice(prepared.corpus.lines(pair, split), number)
        sides = zip(*rows, strict=True)
        return [[text.decode("utf-8") for text in side] for side in sides]

    def build(self, prepared: preparation.PreparedPairs) -> TranslationScorer:
        """Builds the compiled model; the seed decides its weights."""
        train = self.config.train
        with self.scope():
            scorer = TranslationScorer(
                self._make_model(prepared.wordpieces.size),
                label_smoothing=train.label_smoothing,
            )
            scorer.build()
            optimizer = self.make_optimizer(
                schedules.WarmupInverseSqrt(
                    train.learning_rate,
                    train.warmup_steps,
                    train.constant_steps,
                ),
                beta_2=train.beta_2,
            )
            weights = scorer.trainable_variables
            optimizer.build(weights)
            alone = self.strategy is None and not train.jit_compile
            if alone and xla.on_gpu(weights[0]):
                compiled_updates.compile_updates(optimizer)
            scorer.compile_for_words(optimizer, jit_compile=train.jit_compile)
        return scorer

    def batches(
        self,
        prepared: preparation.PreparedPairs,
        split: str,
        start_step: int = 0,
        pair: str | None = None,
    ) -> tf.data.Dataset:
        """Returns the batches of a split, for training from `start_step`."""
        data = self.config.data
        dataset = batching.batches(
            prepared,
            split,
            data.batch_tokens,
            seed=self.config.seed,
            start_step=start_step,
            pair=pair,
            rows_multiple=data.rows_multiple,
        )
        return self.shard(dataset)

    def num_batches(
        self,
        prepared: preparation.PreparedPairs,
        split: str,
        pair: str | None = None,
    ) -> int:
        """Returns the number of batches in one pass over a split."""
        data = self.config.data
        return batching.num_batches(
            prepared,
            split,
            data.batch_tokens,
            pair=pair,
            rows_multiple=data.rows_multiple,
        )

    def callbacks(
        self, prepared: preparation.PreparedPairs, board: TrainingBoard
    ) -> list[keras.callbacks.Callback]:
        """Returns the callback that translates validation text."""
        if self.strategy is not None:
            return []  # decoding is for one device
        return [ValidationTranslations(self, prepared, board)]

    def translator(
        self,
        scorer: TranslationScorer,
        prepared: preparation.PreparedPairs,
        **changes,
    ) -> translator.Translator:
        """Makes the decoder of a model with the settings of the config."""
        return _translator(
            scorer.translation_model,
            prepared.wordpieces,
            self.settings._replace(**changes),
        )

    def evaluate(
        self,
        scorer: TranslationScorer,
        prepared: preparation.PreparedPairs,
        split: str,
        clipped: bool = False,
    ) -> list[str]:
        """Returns perplexity, BLEU and chrF of each pair, a line each.

        Decoders drop nothing, so with `clipped` there is the perplexity only.
        """
        lines = []
        for pair in prepared.corpus.pairs:
            results = scorer.evaluate(
                self.batches(prepared, split, pair=pair.name),
                steps=self.num_batches(prepared, split, pair=pair.name),
                return_dict=True,
                verbose=0,
            )
            lines.append(
                f"{split} {pair.name}: perplexity {results['perplexity']:.3f} "
                f"over {int(results['words'])} wordpieces, ends counted"
            )
            if self.strategy is None and not clipped:
                lines += self._scores(scorer, prepared, split, pair)
        return lines

    def _scores(self, scorer, prepared, split, pair):
        sources, references = self.texts(prepared, split, pair)
        translations = batch_translate.translate_texts(
            self.translator(scorer, prepared),
            sources,
            self.language(prepared, pair),
            self.config.translate.batch_size,
        )
        scores = bleu.corpus_scores(
            translations, references, self.config.translate.bleu_tokenize
        )
        return [
            f"{split} {pair.name}: BLEU {scores.bleu:.2f} "
            f"({scores.bleu_signature}), chrF {scores.chrf:.2f} "
            f"({scores.chrf_signature}), {len(translations)} sentences"
        ]

    def example_outputs(
        self, scorer: TranslationScorer, prepared: preparation.PreparedPairs
    ) -> list[str]:
        """Returns translations of some sentences of the test text."""
        if self.strategy is not None or not self.config.translate.shown:
            return []
        lines = []
        for pair in prepared.corpus.pairs:
            sources, references = self.texts(
                prepared, "test", pair, self.config.translate.shown
            )
            translations = batch_translate.translate_texts(
                self.translator(scorer, prepared),
                sources,
                self.language(prepared, pair),
                self.config.translate.batch_size,
            )
            for row in zip(sources, translations, references, strict=True):
                lines.append(batch_translate.format_example(*row))
        return lines

    def _make_model(self, vocabulary_size):
        model = self.config.model.to_dict()
        return factory.make_translation_model(
            model.pop("variant"),
            vocabulary_size,
            moe=self.config.moe.to_dict(),
            seed=self.config.seed,
            **model,
        )


@functools.lru_cache(maxsize=2)
def _translator(model, wordpieces, settings):
    """Makes a translator once, so that it is traced once."""
    return translator.Translator(model, wordpieces, settings)


def _check(config):
    config_checks.check_config(
        config,
        counts=(
            "data.batch_tokens",
            "data.max_pieces",
            "data.vocabulary_size",
            "translate.batch_size",
            "translate.max_pieces",
            "experts.num_experts",
            "experts.places",
            "experts.sentences",
        ),
        counts_from_zero=(
            "train.constant_steps",
            "translate.validation_sentences",
            "translate.shown",
        ),
    )
    config_checks.check_fraction(
        "train.label_smoothing", config.train.label_smoothing
    )
    config_checks.check_fraction("train.beta_2", config.train.beta_2)
    config_checks.check_choice(
        "translate.checkpoint", config.translate.checkpoint, CHECKPOINTS
    )
    config_checks.check_choice(
        "translate.output", config.translate.output, OUTPUTS
    )
    checks.at_least("data.batch_tokens", config.data.batch_tokens, 8)
    if config.train.jit_compile and config.model.variant.startswith("GNMT"):
        raise ValueError(
            "`train.jit_compile` is for Transformers: XLA cannot compile the "
            "gradient of a GNMT's loops for batches of several lengths. "
            f"Received: train.jit_compile={config.train.jit_compile}, "
            f"model.variant={config.model.variant}"
        )
