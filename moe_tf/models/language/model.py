"""The paper's LSTM language models, with and without experts."""

import functools

import keras
from keras import ops

from moe_tf import special_ids
from moe_tf.layers.feed_forward import FeedForward
from moe_tf.layers.moe import SparseMoE
from moe_tf.layers.recurrent import bidirectional
from moe_tf.layers.recurrent.projected_lstm import ProjectedLSTMCell
from moe_tf.layers.softmax import embedding_rows
from moe_tf.layers.softmax.sampled import SampledSoftmax
from moe_tf.models import seeds
from moe_tf.models.language import variants


@keras.saving.register_keras_serializable(package="moe_tf")
class LanguageModel(keras.Model):
    """Predicts each next word of a text from the words before it.

    Embedding, then the layers of the variant, then a softmax over the
    vocabulary. Every layer but the softmax: dropout on its output, then its
    input is added. Outputs of experts, and of the feed-forward net in their
    place, pass a sigmoid before: `x + dropout(sigmoid(moe(x)))`. No biases.
    The paper says this of its 8M-operation models; here the projected LSTMs
    have the same dropout and residual.

    Id 0 is padding, to the right of the words. Padding is not routed to
    experts; LSTMs run over it, which changes no position before it.

    Initial weights, which the paper does not give, are Keras's defaults and
    follow `keras.utils.set_random_seed`; `seed` is for all later draws.

    Args:
        variant: str, a name that `language.variants.variant` knows,
            such as `"MoE-32"`.
        vocabulary_size: int, `V`, with padding.
        width: optional int, scales the variant. Defaults to the paper's.
        k: optional int, experts per word of `MoE-<n>`, at each level where
            there are two. Defaults to the variant's, 4 or 2.
        dropout: float, share of outputs dropped. Defaults to `0.1`.
        gating, importance_weight, load_weight, capacity_factor, num_groups,
        recompute:
            see `SparseMoE`. The weights default to the router's.
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
        variant,
        vocabulary_size,
        *,
        width=None,
        k=None,
        dropout=0.1,
        gating="noisy_top_k",
        importance_weight=None,
        load_weight=None,
        num_sampled=None,
        capacity_factor=None,
        num_groups=None,
        recompute=False,
        seed=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.variant = variants.variant(
            variant, width=width, k=k, gating=gating
        )
        self.vocabulary_size = vocabulary_size
        self._config = {
            "variant": variant,
            "vocabulary_size": vocabulary_size,
            "width": width,
            "k": k,
            "dropout": dropout,
            "gating": gating,
            "importance_weight": importance_weight,
            "load_weight": load_weight,
            "num_sampled": num_sampled,
            "capacity_factor": capacity_factor,
            "num_groups": num_groups,
            "recompute": recompute,
            "seed": seed,
        }
        # One seed each: equal ones would tie dropout to the gate's noise.
        dropout_seed, moe_seed, softmax_seed = seeds.split(seed, 3)
        dtype = self.dtype_policy
        self.embedding = keras.layers.Embedding(
            vocabulary_size, self.variant.width, dtype=dtype, name="embedding"
        )
        make_experts = functools.partial(
            SparseMoE,
            gating=gating,
            importance_weight=importance_weight,
            load_weight=load_weight,
            capacity_factor=capacity_factor,
            num_groups=num_groups,
            recompute=recompute,
            seed=moe_seed,
        )
        self.blocks = _make_blocks(self.variant, make_experts, dtype)
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

    def features(self, tokens, training=False):
        """What the softmax sees: int `(B, L)` to float `(B, L, D)`."""
        mask_BL = ops.not_equal(tokens, special_ids.PAD)
        x_BLD = self.dropout(self._embed(tokens), training=training)
        for block in self.blocks:
            if isinstance(block, keras.layers.RNN):
                y_BLD = bidirectional.run_rnn(block, x_BLD, training)
            else:
                y_BLD = _feed_forward(block, x_BLD, mask_BL, training)
            x_BLD += self.dropout(y_BLD, training=training)
        return x_BLD

    def _embed(self, tokens):
        rows_BLD = self.embedding(embedding_rows.replicate_ids(tokens))
        return embedding_rows.shard_rows(rows_BLD)

    def initial_states(self, num_sequences):
        """States of the LSTMs before the first word, for `step`."""
        return [
            cell.get_initial_state(batch_size=num_sequences)
            for cell in self._cells()
        ]

    def step(self, tokens, states):
        """Reads one word of every sequence, without dropout or noise.

        Args:
            tokens: int `(B,)`.
            states: as `initial_states` or the step before gave them.

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
                y_BD = _feed_forward(block, x_BD, mask_B, training=False)
            x_BD += y_BD
        return self.softmax.logits(x_BD), new_states

    def export(self, filepath, *args, input_signature=None, **kwargs):
        """`keras.Model.export`, for token ids of any batch and length."""
        if input_signature is None:
            input_signature = [
                keras.InputSpec("int32", (None, None), name="tokens")
            ]
        super().export(
            filepath, *args, input_signature=input_signature, **kwargs
        )

    def get_config(self):
        return {**super().get_config(), **self._config}

    def _cells(self):
        return [
            block.cell
            for block in self.blocks
            if isinstance(block, keras.layers.RNN)
        ]


def _feed_forward(block, x, mask, training):
    if isinstance(block, SparseMoE):
        return ops.sigmoid(block(x, mask=mask, training=training))
    return ops.sigmoid(block(x))


def _make_blocks(variant, make_experts, dtype):
    """The layers between embedding and softmax, built from a description."""
    blocks = []
    num_lstms = 0
    for layer in variant.layers:
        if isinstance(layer, variants.Lstm):
            blocks.append(_make_lstm(layer, variant.width, num_lstms, dtype))
            num_lstms += 1
        elif isinstance(layer, variants.Experts):
            blocks.append(
                make_experts(
                    layer.num_experts,
                    layer.hidden_units,
                    layer.k,
                    branching=layer.branching,
                    dtype=dtype,
                    name="moe",
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
