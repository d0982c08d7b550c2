"""Language modelling: model, data and loss together from a config."""

import tensorflow as tf

from moe_tf import schedules
from moe_tf import special_ids
from moe_tf.data.text import batching
from moe_tf.data.text import preparation
from moe_tf.decoding import language_model
from moe_tf.models import layer_specs
from moe_tf.models import moe_settings
from moe_tf.models.language import variants
from moe_tf.models.language.model import LanguageModel
from moe_tf.models.language.scorer import NextWordScorer
from moe_tf.routing import registry
from moe_tf.training import config_checks
from moe_tf.training import meshes
from moe_tf.training.language import dry_run
from moe_tf.training.language import scoring
from moe_tf.training.task import Task


class LanguageModelTask(Task):
    """Predicting the next word of sentences.

    `configs/lm_demo.py` explains each field of the config.

    Raises:
        ValueError: a field's value cannot be used.
    """

    free_fields = (*Task.free_fields, "sample")

    def check_config(self) -> None:
        """Refuses a config that cannot be used, before any work is done."""
        config_checks.check_config(
            self.config,
            counts=(
                "data.batch_words",
                "data.max_words",
                "data.vocabulary_size",
                "sample.num_sentences",
                "sample.max_words",
            ),
            counts_from_zero=("data.shuffle_buffer", "sample.seed"),
            counts_or_none=("model.width", "model.num_sampled"),
            not_negative=("sample.temperature",),
        )
        meshes.check_mesh(self.config, self.variant().layers)
        self._check_experts()

    def _check_experts(self) -> None:
        """Makes the routers without weights; wrong settings raise."""
        moe = self.config.moe
        mixtures = layer_specs.mixtures(self.variant().layers)
        for layer in mixtures:
            registry.make_router(
                layer.num_experts,
                layer.gating,
                k=layer.k,
                branching=layer.branching,
                importance_weight=moe.importance_weight,
                load_weight=moe.load_weight,
            )
        for field in _LAYER_FIELDS:
            if not mixtures and moe[field]:
                raise ValueError(
                    f"`moe.{field}` is for variants with a choice of "
                    "experts; leave it out here. Received: "
                    f"moe.{field}={moe[field]}, "
                    f"model.variant={self.config.model.variant}"
                )

    def variant(self) -> variants.Variant:
        """Describes the model's layers without building them."""
        model = self.config.model
        return variants.variant(
            model.variant,
            width=model.width,
            **moe_settings.described(self.config.moe),
        )

    def prepare(self, workdir: str) -> preparation.PreparedText:
        """Reads the corpus, counts it and makes its vocabulary."""
        return preparation.prepare_text(self.config.data, workdir)

    def build(self, prepared: preparation.PreparedText) -> NextWordScorer:
        """Builds the compiled model; the seed decides its weights."""
        train = self.config.train
        with self.scope():
            scorer = NextWordScorer(
                LanguageModel(
                    vocabulary_size=prepared.vocabulary.size,
                    moe=self.config.moe.to_dict(),
                    seed=self.config.seed,
                    **self.config.model,
                )
            )
            scorer.build()
            optimizer = self.make_optimizer(
                schedules.WarmupInverseSqrt(
                    train.learning_rate, train.warmup_steps
                )
            )
            optimizer.build(scorer.trainable_variables)
            # XLA would compile anew for each length of batches.
            scorer.compile_for_words(optimizer, jit_compile=False)
        return scorer

    def batches(
        self,
        prepared: preparation.PreparedText,
        split: str,
        start_step: int = 0,
    ) -> tf.data.Dataset:
        """Returns the batches of a split, for training from `start_step`."""
        data = self.config.data
        dataset = batching.batches(
            prepared,
            split,
            data.batch_words,
            seed=self.config.seed,
            start_step=start_step,
            shuffle_buffer=data.shuffle_buffer,
            rows_multiple=data.rows_multiple,
        )
        return self.shard(dataset)

    def num_batches(
        self, prepared: preparation.PreparedText, split: str
    ) -> int:
        """Returns the number of batches in one pass over a split."""
        data = self.config.data
        return batching.batches_per_pass(
            prepared.statistics[split],
            data.batch_words,
            data.max_words,
            data.rows_multiple,
        )

    def dry_run_report(self) -> str:
        """Returns what the run holds and costs; allocates nothing."""
        return dry_run.format_report(self.variant(), self.config)

    def data_report(self, prepared: preparation.PreparedText) -> list[str]:
        """Returns a line for each split, and one for the passes."""
        lines = []
        for split, counts in prepared.statistics.items():
            skipped = sum(counts.skipped.values()) - counts.skipped["blank"]
            lines.append(
                f"{split}: {counts.lines:,} sentences, {counts.words:,} words "
                f"with ends, {100 * counts.unknown_rate:.2f}% unknown, "
                f"{skipped:,} lines skipped"
            )
        steps = self.config.train.steps
        passes = steps / self.num_batches(prepared, "train")
        lines.append(f"{steps:,} steps are {passes:.2f} passes over train")
        return lines

    def evaluate(
        self,
        scorer: NextWordScorer,
        prepared: preparation.PreparedText,
        split: str,
        clipped: bool = False,
    ) -> list[str]:
        """Returns the perplexity on a split, in a line."""
        del clipped  # the layers know
        results = scorer.evaluate(
            self.batches(prepared, split),
            steps=self.num_batches(prepared, split),
            return_dict=True,
            verbose=0,
        )
        unknown = 100 * prepared.statistics[split].unknown_rate
        return [
            f"{split} perplexity {results['perplexity']:.2f} over "
            f"{int(results['words'])} words, ends of sentences counted "
            f"({unknown:.2f}% unknown)"
        ]

    def example_outputs(
        self, scorer: NextWordScorer, prepared: preparation.PreparedText
    ) -> list[str]:
        """Returns sentences drawn from the trained model."""
        return [f"sample: {text}" for text in self.sample(scorer, prepared)]

    def score(
        self,
        scorer: NextWordScorer,
        sentences: list[bytes],
        prepared: preparation.PreparedText,
    ) -> tuple:
        """Scores up to 64 sentences.

        Returns:
            The batch, see `batching.encode`, and its negative
            log-likelihoods.
        """
        if self.strategy is None:
            batch = batching.encode(prepared, sentences)
            return batch, scorer(batch[0])
        rows = self.config.data.rows_multiple
        num_rows = -(-scoring.LINES_AT_ONCE // rows) * rows
        batch = batching.encode(prepared, sentences, num_rows)
        return batch, meshes.score_on_mesh(scorer, self.strategy, batch[0])

    def sample(
        self, scorer: NextWordScorer, prepared: preparation.PreparedText
    ) -> list[str]:
        """Draws sentences from the model with the settings `config.sample`."""
        sample = self.config.sample
        model = scorer.language_model
        if self.strategy is None:
            step, num_rows = tf.function(model.step), sample.num_sentences
        else:
            step, num_rows = meshes.padded_step(
                model.step,
                self.strategy,
                sample.num_sentences,
                self.config.data.rows_multiple,
            )
        drawn = language_model.sample_text(
            step,
            model.initial_states(num_rows),
            sample.num_sentences,
            start_id=special_ids.START,
            end_id=special_ids.END,
            max_length=sample.max_words,
            temperature=sample.temperature,
            seed=sample.seed,
            forbidden_ids=(
                special_ids.PAD,
                special_ids.UNK,
                special_ids.START,
            ),
        )
        return [prepared.vocabulary.sentence(ids) for ids in drawn]


# Fields of `config.moe` that a variant does not take, so does not check.
_LAYER_FIELDS = (
    "importance_weight",
    "load_weight",
    "capacity_factor",
    "num_groups",
    "recompute",
)
