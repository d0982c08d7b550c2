"""A task brings model, data and loss together from a config."""

import contextlib
import dataclasses

import keras
import ml_collections
import tensorflow as tf

from moe_tf import checks
from moe_tf import decoding
from moe_tf import optimizers
from moe_tf import schedules
from moe_tf.data import batching
from moe_tf.data import preparation
from moe_tf.data import vocabulary as vocabularies
from moe_tf.distribute import MeshStrategy
from moe_tf.layers import routers
from moe_tf.models import language_model_variants as variants
from moe_tf.models.language_model import LanguageModel
from moe_tf.models.next_word_scorer import NextWordScorer
from moe_tf.training import meshes
from moe_tf.training import scoring

OPTIMIZERS = {
    "adam": keras.optimizers.Adam,
    "factored_adam": optimizers.FactoredAdam,
}


@dataclasses.dataclass(frozen=True)
class LanguageModelTask:
    """Predicting the next word of sentences.

    Attributes:
        config: the run's config; `configs/lm_demo.py` explains each field.
            `data.rows_multiple` is set here if a mesh or groups need it.
        strategy: optional `MeshStrategy`, see `meshes.strategy`.

    Raises:
        ValueError: a field's value cannot be used.
    """

    config: ml_collections.ConfigDict
    strategy: MeshStrategy | None = None

    # What decides neither weights nor data may differ from the run's config.
    free_fields = (
        "mesh",
        "sample",
        "train.keep_checkpoints",
        "train.log_every",
        "train.steps",
    )

    def __post_init__(self):
        _check_fields(self.config)
        meshes.check(self.config, self.variant())
        self._check_experts()

    def _check_experts(self) -> None:
        """Makes the routers, without weights, so that wrong settings tell."""
        model = self.config.model
        mixtures = [
            layer
            for layer in self.variant().layers
            if isinstance(layer, variants.Experts)
        ]
        for layer in mixtures:
            routers.make(
                layer.num_experts,
                layer.gating,
                k=layer.k,
                branching=layer.branching,
                importance_weight=model.importance_weight,
                load_weight=model.load_weight,
            )
        for field in _OF_EXPERTS:
            if not mixtures and model[field]:
                raise ValueError(
                    f"`model.{field}` is for variants with a choice of "
                    "experts; leave it out here. Received: "
                    f"model.{field}={model[field]}, "
                    f"model.variant={model.variant}"
                )

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes, for all there are."""
        return self.strategy is None or self.strategy.is_first

    def variant(self) -> variants.Variant:
        """What the model consists of, without building it."""
        model = self.config.model
        return variants.variant(
            model.variant, width=model.width, k=model.k, gating=model.gating
        )

    def prepare(self, workdir: str) -> preparation.Prepared:
        """The corpus, counted, and its vocabulary."""
        return preparation.prepare(self.config.data, workdir)

    def build(self, prepared: preparation.Prepared) -> NextWordScorer:
        """The compiled model, with its weights as the seed makes them."""
        train = self.config.train
        scope = contextlib.nullcontext()
        if self.strategy is not None:
            scope = self.strategy.scope()
        with scope:
            scorer = NextWordScorer(
                LanguageModel(
                    vocabulary_size=prepared.vocabulary.size,
                    seed=self.config.seed,
                    **self.config.model,
                )
            )
            scorer.build()
            optimizer = OPTIMIZERS[train.optimizer](
                schedules.WarmupInverseSqrt(
                    train.learning_rate, train.warmup_steps
                ),
                global_clipnorm=train.clip_norm,
            )
            optimizer.build(scorer.trainable_variables)
            # XLA would compile anew for each length of batches.
            scorer.compile_for_words(optimizer, jit_compile=False)
        return scorer

    def batches(
        self, prepared: preparation.Prepared, split: str, start_step: int = 0
    ) -> tf.data.Dataset:
        """Batches of a split, for training from `start_step` on."""
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
        if self.strategy is None:
            return dataset
        # Every process reads all, and works on its rows.
        return self.strategy.shard_batches(dataset)

    def num_batches(self, prepared: preparation.Prepared, split: str) -> int:
        """Number of batches in one pass over a split."""
        data = self.config.data
        return batching.batches_per_pass(
            prepared.statistics[split],
            data.batch_words,
            data.max_words,
            data.rows_multiple,
        )

    def score(
        self,
        scorer: NextWordScorer,
        sentences: list[bytes],
        prepared: preparation.Prepared,
    ):
        """A batch of up to 64 sentences, and its negative log-likelihoods."""
        if self.strategy is None:
            batch = batching.encode(prepared, sentences)
            return batch, scorer(batch[0])
        rows = self.config.data.rows_multiple
        num_rows = -(-scoring.LINES_AT_ONCE // rows) * rows
        batch = batching.encode(prepared, sentences, num_rows)
        return batch, meshes.score(scorer, self.strategy, batch[0])

    def sample(
        self, scorer: NextWordScorer, prepared: preparation.Prepared
    ) -> list[str]:
        """Sentences drawn from the model, as `config.sample` says."""
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
        drawn = decoding.sample(
            step,
            model.initial_states(num_rows),
            sample.num_sentences,
            start_id=vocabularies.START,
            end_id=vocabularies.END,
            max_length=sample.max_words,
            temperature=sample.temperature,
            seed=sample.seed,
            forbidden_ids=(
                vocabularies.PAD,
                vocabularies.UNK,
                vocabularies.START,
            ),
        )
        return [prepared.vocabulary.sentence(ids) for ids in drawn]


_OF_EXPERTS = (
    "importance_weight",
    "load_weight",
    "capacity_factor",
    "num_groups",
    "recompute",
)
_COUNTS = (
    "data.batch_words",
    "data.max_words",
    "data.vocabulary_size",
    "train.steps",
    "train.evaluate_every",
    "train.log_every",
    "train.keep_checkpoints",
    "train.warmup_steps",
    "sample.num_sentences",
    "sample.max_words",
)
_COUNTS_FROM_ZERO = ("data.shuffle_buffer", "sample.seed")
_COUNTS_OR_NONE = (
    "mesh.batch",
    "mesh.expert",
    "data.rows_multiple",
    "model.width",
    "model.k",
    "model.num_sampled",
    "model.num_groups",
)
_POSITIVE_OR_NONE = ("model.capacity_factor", "train.clip_norm")
_NOT_NEGATIVE = ("sample.temperature",)
_NOT_NEGATIVE_OR_NONE = ("model.importance_weight", "model.load_weight")


def _check_fields(config):
    """Refuses values that would fail later, when work has been done."""

    def value_of(field):
        group, _, name = field.partition(".")
        return config[group][name]

    checks.at_least("seed", config.seed, 0)
    try:
        keras.dtype_policies.get(config.dtype_policy)
    except ValueError as error:
        raise ValueError(
            "`dtype_policy` must be one of Keras's, such as float32 or "
            f"mixed_bfloat16. Received: dtype_policy={config.dtype_policy}"
        ) from error
    if config.train.optimizer not in OPTIMIZERS:
        raise ValueError(
            f"`train.optimizer` must be one of {', '.join(OPTIMIZERS)}. "
            f"Received: train.optimizer={config.train.optimizer}"
        )
    for field in _COUNTS:
        checks.at_least(field, value_of(field), 1)
    for field in _COUNTS_FROM_ZERO:
        checks.at_least(field, value_of(field), 0)
    for field in _COUNTS_OR_NONE:
        checks.at_least(field, value_of(field), 1, none_is_fine=True)
    for field in _POSITIVE_OR_NONE:
        checks.positive(field, value_of(field), none_is_fine=True)
    for field in _NOT_NEGATIVE:
        checks.not_negative(field, value_of(field))
    for field in _NOT_NEGATIVE_OR_NONE:
        checks.not_negative(field, value_of(field), none_is_fine=True)
    checks.positive("train.learning_rate", config.train.learning_rate)
    if not 0 <= config.model.dropout < 1:
        raise ValueError(
            "`model.dropout` must be at least 0 and below 1. "
            f"Received: model.dropout={config.model.dropout}"
        )
    steps, every = config.train.steps, config.train.evaluate_every
    if steps % every:
        raise ValueError(
            "`train.steps` must be a multiple of `train.evaluate_every`. "
            f"Received: train.steps={steps}, train.evaluate_every={every}"
        )
