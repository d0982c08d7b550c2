"""Base class of the translation models: tables, softmax, config, export."""

import inspect
import os
from collections.abc import Mapping

import keras
from keras import ops

from moe_tf import special_ids
from moe_tf.layers.feed_forward import FeedForward
from moe_tf.layers.moe import SparseMoE
from moe_tf.layers.softmax import embedding_rows
from moe_tf.layers.softmax.tied import WordSoftmax
from moe_tf.models import layer_specs as layers
from moe_tf.models import moe_settings
from moe_tf.models.seeds import split_seed
from moe_tf.models.translation import variants
from moe_tf.types import Tensor


class TranslationModel(keras.Model):
    """Base class of models of a target text given a source text.

    Id 0 is padding, to the right of the words. Padding is not attended to and
    not routed to experts. Outputs at padded target positions have no meaning.

    Subclasses make their layers after `super().__init__`, and implement
    `encode`, `decode`, `initial_states`, `step` and `_own_layers`.

    Args:
        variant: str, see `translation.variants.variant`.
        vocabulary_size: int, `V`, with padding.
        sizes: mapping of the sizes that `translation.variants.variant` takes
            besides those of experts.
        dropout: float.
        moe: optional mapping, see `models.moe_settings`.
        seed: optional int.
    """

    architecture = None

    def __init__(
        self,
        variant: str,
        vocabulary_size: int,
        *,
        sizes: Mapping,
        dropout: float,
        moe: Mapping | None,
        seed: int | None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        moe = moe_settings.complete(moe)
        self.variant = variants.variant(
            variant, **sizes, **moe_settings.described(moe)
        )
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
            "dropout": dropout,
            "moe": moe,
            "seed": seed,
        }
        # One for each layer that draws; there are no more than layers.
        num_seeds = 2 * len(self.variant.layers) + 2
        self._seeds = iter(split_seed(seed, num_seeds))
        self._make_dropout_and_tables(self._table_initializer())

    def _table_initializer(self):
        """Returns the initializer of the embeddings and the softmax."""
        return "uniform"

    def _make_dropout_and_tables(self, initializer):
        dtype = self.dtype_policy
        self.dropout = keras.layers.Dropout(
            self._config["dropout"],
            seed=next(self._seeds),
            dtype=dtype,
            name="dropout",
        )
        self.softmax = WordSoftmax(
            self.vocabulary_size, initializer, dtype=dtype, name="softmax"
        )
        self.source_embedding = self.target_embedding = None
        if not self.variant.tie_embeddings:
            self.source_embedding, self.target_embedding = (
                keras.layers.Embedding(
                    self.vocabulary_size,
                    self.variant.width,
                    embeddings_initializer=initializer,
                    dtype=dtype,
                    name=name,
                )
                for name in ("source_embedding", "target_embedding")
            )

    def call(self, inputs, training=False):
        return self.softmax.logits(self.features(inputs, training=training))

    def features(
        self, inputs: Mapping[str, Tensor], training: bool = False
    ) -> Tensor:
        """Computes the input of the softmax.

        Args:
            inputs: dict of `source`, int `(B, S)`, and `tokens`, int
                `(B, L)`: the target, each word one position later.
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
        for layer in self._own_layers():
            if not layer.built:
                layer.build(shape)
        self.built = True

    def export(
        self,
        filepath: str | os.PathLike,
        *args,
        input_signature: list | None = None,
        **kwargs,
    ) -> None:
        """Exports as `keras.Model` does, for ids of any batch and lengths."""
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
        config = {**super().get_config(), **self._config}
        return {**config, "moe": dict(self._config["moe"])}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = moe_settings.nest_former_fields(config)
        return super().from_config(config, custom_objects)

    def _embed(self, table, tokens):
        """Looks tokens up in a table, by default in the softmax's."""
        if table is None:
            return self.softmax.embed(tokens)
        return embedding_rows.shard_rows(
            table(embedding_rows.replicate_ids(tokens))
        )

    def _make_net(self, layer, moe_name, dense_name):
        """Makes an MoE layer, or the feed-forward net in its place."""
        if isinstance(layer, layers.FeedForward):
            return FeedForward(
                layer.hidden_units, dtype=self.dtype_policy, name=dense_name
            )
        return SparseMoE(
            layer.num_experts,
            layer.hidden_units,
            layer.k,
            branching=layer.branching,
            seed=next(self._seeds),
            dtype=self.dtype_policy,
            name=moe_name,
            **moe_settings.of_layer(self._config["moe"]),
        )


def is_word(tokens: Tensor) -> Tensor:
    """Returns the mask of the tokens that are not padding, bool."""
    return ops.not_equal(tokens, special_ids.PAD)


def keyword_arguments(model_class: type[TranslationModel]) -> list[str]:
    """Returns the names of the settings that a model takes by keyword."""
    return [
        name
        for name, parameter in inspect.signature(
            model_class.__init__
        ).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    ]
