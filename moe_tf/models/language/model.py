"""The paper's LSTM language models, with and without experts."""

import os
from collections.abc import Mapping

import keras
from keras import ops

from moe_tf import special_ids
from moe_tf.layers.feed_forward import FeedForward
from moe_tf.layers.moe import SparseMoE
from moe_tf.layers.recurrent import bidirectional
from moe_tf.layers.recurrent.projected_lstm import ProjectedLSTMCell
from moe_tf.layers.softmax import embedding_rows
from moe_tf.layers.softmax.sampled import SampledSoftmax
from moe_tf.models import moe_settings
from moe_tf.models.language import variants
from moe_tf.models.seeds import split_seed
from moe_tf.models.sigmoid_output import sigmoid_output
from moe_tf.types import Nest
from moe_tf.types import Tensor


@keras.saving.register_keras_serializable(package="moe_tf")
class LanguageModel(keras.Model):
    """Predicts each next word of a text from the words before it.

    The layers of the variant stand between an embedding and a softmax over
    the vocabulary. The embedding and each of these layers have dropout on
    their outputs, and each layer has a residual connection. The outputs of
    experts, and of the feed-forward net in their place, first pass a sigmoid:
    `x + dropout(sigmoid(moe(x)))`. There are no biases. The paper gives this
    structure for its 8M-operation models; the models of projected LSTMs have
    the same dropout and residual connections here.

    Id 0 is padding, to the right of the words. Padding is not routed to
    experts. LSTMs run over padding, which changes no position before it.

    The paper does not give its initial weights. They are Keras's defaults
    here and follow `keras.utils.set_random_seed`; `seed` is for all draws
    after that.

    Example:

    >>> model = moe_tf.models.LanguageModel(
    ...     "MoE-8", 100, width=16, moe={"k": 2, "capacity_factor": 1.5}
    ... )
    >>> tokens = np.array([[2, 17, 5, 9], [2, 44, 3, 0]])
    >>> model(tokens).shape
    TensorShape([2, 4, 100])

    Args:
        variant: str, a name that `language.variants.variant` knows,
            such as `"MoE-32"`.
        vocabulary_size: int, `V`, with padding.
        width: optional int, scales the variant. Defaults to the paper's.
        dropout: float, fraction of outputs dropped. Defaults to `0.1`.
        moe: optional mapping, settings of the MoE layer. The keys are
            arguments of `SparseMoE`: `num_experts`, `k` and `hidden_units`,
            by default those of the variant; `gating`, `importance_weight`,
            `load_weight`, `capacity_factor`, `num_groups` and `recompute`,
            by default those of `SparseMoE`.
        num_sampled: optional int, classes drawn by the softmax when a
            `NextWordScorer` trains this model. `None` for the whole softmax.
        seed: optional int for dropout, the gate's noise and the softmax's
            draws.

    Call arguments:
        tokens: int `(B, L)`.
        training: bool.

    Returns:
        Logits of the next word, float32 `(B, L, V)`.

    Raises:
        ValueError: if no variant has this name, or a setting does not fit.

    Reference:
     - [Shazeer et al., 2017](https://arxiv.org/abs/1701.06538), section 5.1
       and appendix C
    """

    def __init__(
        self,
        variant: str,
        vocabulary_size: int,
        *,
        width: int | None = None,
        dropout: float = 0.1,
        moe: Mapping | None = None,
        num_sampled: int | None = None,
        seed: int | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        moe = moe_settings.complete(moe)
        self.variant = variants.variant(
            variant, width=width, **moe_settings.described(moe)
        )
        self.vocabulary_size = vocabulary_size
        self._config = {
            "variant": variant,
            "vocabulary_size": vocabulary_size,
            "width": width,
            "dropout": dropout,
            "moe": moe,
            "num_sampled": num_sampled,
            "seed": seed,
        }
        dropout_seed, moe_seed, softmax_seed = split_seed(seed, 3)
        dtype = self.dtype_policy
        self.embedding = keras.layers.Embedding(
            vocabulary_size, self.variant.width, dtype=dtype, name="embedding"
        )
        moe_arguments = {**moe_settings.of_layer(moe), "seed": moe_seed}
        self.blocks = _make_blocks(self.variant, moe_arguments, dtype)
        self.dropout = keras.layers.Dropout(
            dropout, seed=dropout_seed, dtype=dtype, name="dropout"
        )
        self.softmax = SampledSoftmax(
            vocabulary_size,
            num_sampled,
            seed=softmax_seed,
            dtype=dtype,
            name="softmax",
        )

    def build(self, input_shape=None):
        shape = (None, None, self.variant.width)
        shapes = [(None, None), *[shape] * (len(self.blocks) + 1)]
        layers = (self.embedding, *self.blocks, self.softmax)
        for layer, shape in zip(layers, shapes, strict=True):
            if not layer.built:  # `features` and `step` build them as well
                layer.build(shape)
        self.built = True

    def call(self, tokens, training=False):
        return self.softmax.logits(self.features(tokens, training=training))

    def features(self, tokens: Tensor, training: bool = False) -> Tensor:
        """Computes the input of the softmax.

        Args:
            tokens: int `(B, L)`.
            training: bool.

        Returns:
            Float `(B, L, D)`.
        """
        mask_BL = ops.not_equal(tokens, special_ids.PAD)
        x_BLD = self.dropout(self._embed(tokens), training=training)
        for block in self.blocks:
            if isinstance(block, keras.layers.RNN):
                y_BLD = bidirectional.run_rnn(block, x_BLD, training)
            else:
                y_BLD = sigmoid_output(block, x_BLD, mask_BL, training)
            x_BLD += self.dropout(y_BLD, training=training)
        return x_BLD

    def _embed(self, tokens):
        rows_BLD = self.embedding(embedding_rows.replicate_ids(tokens))
        return embedding_rows.shard_rows(rows_BLD)

    def initial_states(self, num_sequences: int) -> Nest:
        """Returns the LSTMs' states before the first word, for `step`."""
        return [
            cell.get_initial_state(batch_size=num_sequences)
            for cell in self._cells()
        ]

    def step(self, tokens: Tensor, states: Nest) -> tuple[Tensor, Nest]:
        """Reads one word of every sequence, without dropout or noise.

        Args:
            tokens: int `(B,)`.
            states: those of `initial_states` or of the step before.

        Returns:
            Logits of the next word, float32 `(B, V)`, and the states.
        """
        mask_B = ops.not_equal(tokens, special_ids.PAD)
        x_BD = self.embedding(tokens)
        old_states, new_states = iter(states), []
        for block in self.blocks:
            if isinstance(block, keras.layers.RNN):
                y_BD, state = block.cell(x_BD, next(old_states))
                new_states.append(state)
            else:
                y_BD = sigmoid_output(block, x_BD, mask_B, training=False)
            x_BD += y_BD
        return self.softmax.logits(x_BD), new_states

    def export(
        self,
        filepath: str | os.PathLike,
        *args,
        input_signature: list | None = None,
        **kwargs,
    ) -> None:
        """Exports as `keras.Model` does, for ids of any batch and length."""
        if input_signature is None:
            input_signature = [
                keras.InputSpec("int32", (None, None), name="tokens")
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

    def _cells(self):
        return [
            block.cell
            for block in self.blocks
            if isinstance(block, keras.layers.RNN)
        ]


def _make_blocks(variant, moe_arguments, dtype):
    """Makes the layers between embedding and softmax."""
    blocks = []
    num_lstms = 0
    for layer in variant.layers:
        if isinstance(layer, variants.Lstm):
            blocks.append(_make_lstm(layer, variant.width, num_lstms, dtype))
            num_lstms += 1
        elif isinstance(layer, variants.Experts):
            blocks.append(
                SparseMoE(
                    layer.num_experts,
                    layer.hidden_units,
                    layer.k,
                    branching=layer.branching,
                    dtype=dtype,
                    name="moe",
                    **moe_arguments,
                )
            )
        else:
            blocks.append(
                FeedForward(
                    layer.hidden_units, dtype=dtype, name="feed_forward"
                )
            )
    return blocks


def _make_lstm(layer, width, index, dtype):
    name = f"lstm_{index}"
    if layer.projected:
        cell = ProjectedLSTMCell(layer.units, width, dtype=dtype, name="cell")
        return keras.layers.RNN(
            cell, return_sequences=True, dtype=dtype, name=name
        )
    return keras.layers.LSTM(
        layer.units,
        use_bias=False,
        return_sequences=True,
        dtype=dtype,
        name=name,
    )
