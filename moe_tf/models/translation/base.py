"""What all translation models have: tables, softmax, settings, export."""

import inspect

import keras
from keras import ops

from moe_tf import special_ids
from moe_tf.layers.moe import SparseMoE
from moe_tf.layers.softmax import embedding_rows
from moe_tf.layers.softmax.tied import WordSoftmax
from moe_tf.models import layer_specs as layers
from moe_tf.models import seeds
from moe_tf.models.translation import variants

MOE_SETTINGS = (
    "gating",
    "importance_weight",
    "load_weight",
    "capacity_factor",
    "num_groups",
    "recompute",
)


class TranslationModel(keras.Model):
    """A model of a target text given a source text.

    Id 0 is padding, to the right of the words. It is not attended to and not
    routed to experts; what a model gives at a padded target position means
    nothing.

    Subclasses make their layers in `_make`, and implement `encode`,
    `decode`, `initial_states` and `step`.
    """

    architecture = None

    def __init__(
        self,
        variant,
        vocabulary_size,
        *,
        sizes,
        settings,
        moe,
        table_initializer,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.variant = variants.variant(variant, gating=moe["gating"], **sizes)
        if self.variant.architecture != self.architecture:
            raise ValueError(
                f"`variant` must be one of {self.architecture}. "
                f"Received: variant={variant}"
            )
        self.vocabulary_size = vocabulary_size
        self._config = {
            "variant": variant,
            "vocabulary_size": vocabulary_size,
            **sizes,
            **settings,
            **moe,
        }
        self._moe = moe
        # One for each layer that draws; there are no more than layers.
        num_seeds = 2 * len(self.variant.layers) + 2
        self._seeds = iter(seeds.split(settings["seed"], num_seeds))
        self.dropout = keras.layers.Dropout(
            settings["dropout"],
            seed=next(self._seeds),
            dtype=self.dtype_policy,
            name="dropout",
        )
        self.softmax = WordSoftmax(
            vocabulary_size,
            table_initializer,
            dtype=self.dtype_policy,
            name="softmax",
        )
        self.source_embedding = self.target_embedding = None
        if not self.variant.tie_embeddings:
            self.source_embedding, self.target_embedding = (
                keras.layers.Embedding(
                    vocabulary_size,
                    self.variant.width,
                    embeddings_initializer=table_initializer,
                    dtype=self.dtype_policy,
                    name=name,
                )
                for name in ("source_embedding", "target_embedding")
            )

    def call(self, inputs, training=False):
        return self.softmax.logits(self.features(inputs, training=training))

    def features(self, inputs, training=False):
        """What the softmax sees.

        Args:
            inputs: dict of `source`, int `(B, S)`, and `tokens`, int
                `(B, L)`, the target so far at every position.
            training: bool.

        Returns:
            Float `(B, L, D)`.
        """
        memory = self.encode(inputs["source"], training=training)
        return self.decode(inputs["tokens"], memory, training=training)

    def build(self, input_shape=None):
        if self.built:
            return
        tables = (self.source_embedding, self.target_embedding)
        for table in tables:
            if table is not None and not table.built:
                table.build((None, None))
        shape = (None, None, self.variant.width)
        if not self.softmax.built:
            self.softmax.build(shape)
        self._build_layers(shape)
        self.built = True

    def export(self, filepath, *args, input_signature=None, **kwargs):
        """`keras.Model.export`, for token ids of any batch and lengths."""
        if input_signature is None:
            input_signature = [
                {
                    name: keras.InputSpec("int32", (None, None), name=name)
                    for name in ("source", "tokens")
                }
            ]
        super().export(
            filepath, *args, input_signature=input_signature, **kwargs
        )

    def get_config(self):
        return {**super().get_config(), **self._config}

    def _embed(self, table, tokens):
        """Rows of a table, or of the softmax's where there is none."""
        if table is None:
            return self.softmax.embed(tokens)
        return embedding_rows.shard_rows(
            table(embedding_rows.replicate_ids(tokens))
        )

    def _make_experts(self, layer, name):
        return SparseMoE(
            layer.num_experts,
            layer.hidden_units,
            layer.k,
            branching=layer.branching,
            seed=next(self._seeds),
            dtype=self.dtype_policy,
            name=name,
            **self._moe,
        )


def is_word(tokens):
    """Mask of what is no padding."""
    return ops.not_equal(tokens, special_ids.PAD)


def settings_of(model_class):
    """Names of the settings that a model takes by keyword."""
    return [
        name
        for name, parameter in inspect.signature(
            model_class.__init__
        ).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    ]


def is_experts(layer):
    return isinstance(layer, layers.Experts)
