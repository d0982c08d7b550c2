"""The paper's GNMT, with and without experts."""

import keras
from keras import ops

from moe_tf.layers.attention import multi_head
from moe_tf.layers.feed_forward import FeedForward
from moe_tf.layers.moe import SparseMoE
from moe_tf.layers.recurrent import bidirectional as recurrence
from moe_tf.layers.recurrent.attention_lstm import AttentionLSTM
from moe_tf.layers.recurrent.projected_lstm import ProjectedLSTMCell
from moe_tf.models import layer_specs as layers
from moe_tf.models.translation import variants
from moe_tf.models.translation.base import TranslationModel
from moe_tf.models.translation.base import is_word


@keras.saving.register_keras_serializable(package="moe_tf")
class Gnmt(TranslationModel):
    """Translates with projected LSTMs and attention, and experts between.

    An encoder of three LSTM layers with experts between the second and the
    third, and a decoder of two with experts between them: wherever a stack
    has another number, they stand before its last layer. The bottom layer of
    the decoder attends to the source; its output at the position before is
    the query, and the context goes into it alone, which the paper's count of
    operations asks for. Every layer: dropout on its output, then its input
    is added. Outputs of experts, and of the feed-forward net in their place,
    pass a sigmoid before. No biases; three separate tables. LSTMs run over
    padding, which changes no position before it.

    Initial weights, which the paper does not give, are Keras's defaults and
    follow `keras.utils.set_random_seed`; `seed` is for dropout and noise.

    Args:
        variant: str, a `GNMT` name that `translation.variants.variant` knows,
            such as `"GNMT-MoE-32"`.
        vocabulary_size: int, `V`, with padding.
        width, cells, attention_units, encoder_layers, decoder_layers,
        bidirectional, expert_hidden, k:
            optional sizes, see `translation.variants.variant`.
        attention_form: `"product"`, the paper's, or `"sum"`, GNMT's; see
            `AdditiveAttention`. Defaults to `"product"`.
        dropout: float. Defaults to `0.1`; the paper has 0.4 for single
            language pairs.
        gating, importance_weight, load_weight, capacity_factor, num_groups,
        recompute:
            see `SparseMoE`. The paper has weights of 0.01.
        seed: optional int.

    Call arguments:
        inputs: dict of `source`, int `(B, S)`, and `tokens`, int `(B, L)`.
        training: bool.

    Returns:
        Logits of the word after each token, float32 `(B, L, V)`.

    Raises:
        ValueError: if no variant has this name, or a setting does not fit.

    Reference:
     - [Shazeer et al., 2017](https://arxiv.org/abs/1701.06538), section 5.3
       and appendices E and G
     - [Wu et al., 2016](https://arxiv.org/abs/1609.08144)
    """

    architecture = variants.GNMT

    def __init__(
        self,
        variant,
        vocabulary_size,
        *,
        width=None,
        cells=None,
        attention_units=None,
        encoder_layers=None,
        decoder_layers=None,
        bidirectional=None,
        expert_hidden=None,
        k=None,
        attention_form="product",
        dropout=0.1,
        gating="noisy_top_k",
        importance_weight=None,
        load_weight=None,
        capacity_factor=None,
        num_groups=None,
        recompute=False,
        seed=None,
        **kwargs,
    ):
        super().__init__(
            variant,
            vocabulary_size,
            sizes={
                "width": width,
                "cells": cells,
                "attention_units": attention_units,
                "encoder_layers": encoder_layers,
                "decoder_layers": decoder_layers,
                "bidirectional": bidirectional,
                "expert_hidden": expert_hidden,
                "k": k,
            },
            settings={
                "attention_form": attention_form,
                "dropout": dropout,
                "seed": seed,
            },
            moe={
                "gating": gating,
                "importance_weight": importance_weight,
                "load_weight": load_weight,
                "capacity_factor": capacity_factor,
                "num_groups": num_groups,
                "recompute": recompute,
            },
            table_initializer="uniform",
            **kwargs,
        )
        function, bottom, *rest = self.variant.decoder
        self.encoder_layers = self._make_layers("encoder", self.variant.encoder)
        self.attention_lstm = AttentionLSTM(
            bottom.units,
            function.units,
            attention_form,
            dtype=self.dtype_policy,
            name="decoder_lstm_0",
        )
        self.decoder_layers = self._make_layers("decoder", rest, num_lstms=1)

    def _make_layers(self, side, descriptions, num_lstms=0):
        made = []
        for layer in descriptions:
            settings = {"dtype": self.dtype_policy}
            if isinstance(layer, layers.Experts):
                made.append(self._make_experts(layer, f"{side}_moe"))
                continue
            if isinstance(layer, layers.FeedForward):
                name = f"{side}_feed_forward"
                made.append(
                    FeedForward(layer.hidden_units, name=name, **settings)
                )
                continue
            settings["name"] = f"{side}_lstm_{num_lstms}"
            num_lstms += 1
            if isinstance(layer, layers.BidirectionalLstm):
                made.append(
                    recurrence.BidirectionalLSTM(layer.units, **settings)
                )
                continue
            cell = ProjectedLSTMCell(
                layer.units,
                self.variant.width,
                dtype=self.dtype_policy,
                name="cell",
            )
            made.append(
                keras.layers.RNN(cell, return_sequences=True, **settings)
            )
        return made

    def _build_layers(self, shape):
        for layer in (
            *self.encoder_layers,
            self.attention_lstm,
            *self.decoder_layers,
        ):
            if not layer.built:
                layer.build(shape)

    def encode(self, source, training=False):
        """Reads the source.

        Args:
            source: int `(B, S)`.
            training: bool.

        Returns:
            Dict of `mask`, bool `(B, S)`, `values`, float `(B, S, D)`, and
            `keys`, float `(B, S, A)`.
        """
        mask_BS = is_word(source)
        x_BSD = self._embed(self.source_embedding, source)
        x_BSD = self.dropout(x_BSD, training=training)
        for layer in self.encoder_layers:
            x_BSD = self._add(layer, x_BSD, mask_BS, training)
        keys_BSA = self.attention_lstm.attention.keys(x_BSD)
        return {"mask": mask_BS, "values": x_BSD, "keys": keys_BSA}

    def decode(self, tokens, memory, training=False):
        """What the softmax sees: int `(B, L)` to float `(B, L, D)`."""
        mask_BL = is_word(tokens)
        x_BLD = self._embed(self.target_embedding, tokens)
        x_BLD = self.dropout(x_BLD, training=training)
        y_BLD = self.attention_lstm(x_BLD, *_attended(memory))
        x_BLD += self.dropout(y_BLD, training=training)
        for layer in self.decoder_layers:
            x_BLD = self._add(layer, x_BLD, mask_BL, training)
        return x_BLD

    def _add(self, layer, x_BLD, mask_BL, training):
        """The next layer with its dropout and residual."""
        if isinstance(layer, keras.layers.RNN):
            y_BLD = recurrence.run_rnn(layer, x_BLD, training)
        elif isinstance(layer, recurrence.BidirectionalLSTM):
            y_BLD = layer(x_BLD, mask=mask_BL, training=training)
        else:
            y_BLD = _feed_forward(layer, x_BLD, mask_BL, training)
        return x_BLD + self.dropout(y_BLD, training=training)

    def initial_states(self, memory, max_length):
        """States before the first target position, for `step`.

        Args:
            memory: as `encode` gave it, of `N` rows.
            max_length: int; an LSTM's states do not depend on it.

        Returns:
            Dict of, for each LSTM `i` of the decoder, `output_i`, float
            `(N, D)`, and `cells_i`, float `(N, H)`.
        """
        num_rows = ops.shape(memory["mask"])[0]
        states = [self.attention_lstm.initial_states(num_rows)]
        states += [
            layer.cell.get_initial_state(batch_size=num_rows)
            for layer in self.decoder_layers
            if isinstance(layer, keras.layers.RNN)
        ]
        return _named(states)

    def step(self, tokens, states, memory):
        """Reads one target word of every row, without dropout or noise.

        Args:
            tokens: int `(N,)`.
            states: as `initial_states` or the step before gave them.
            memory: as `encode` gave it, of `N` rows.

        Returns:
            Logits of the next word, float32 `(N, V)`, the states, and the
            weights on the source, float32 `(N, S)`.
        """
        mask_N = is_word(tokens)
        x_ND = self._embed(self.target_embedding, tokens)
        y_ND, weight_NS, state = self.attention_lstm.step(
            x_ND, _of(states, 0), *_attended(memory)
        )
        x_ND += y_ND
        new_states = [state]
        for layer in self.decoder_layers:
            if isinstance(layer, keras.layers.RNN):
                y_ND, state = layer.cell(x_ND, _of(states, len(new_states)))
                new_states.append(state)
            else:
                y_ND = _feed_forward(layer, x_ND, mask_N, training=False)
            x_ND += y_ND
        return self.softmax.logits(x_ND), _named(new_states), weight_NS


def _attended(memory):
    bias_BS = multi_head.mask_bias(memory["mask"])
    return memory["values"], memory["keys"], bias_BS


def _named(states):
    names = ("output", "cells")
    return {
        f"{name}_{index}": part
        for index, state in enumerate(states)
        for name, part in zip(names, state, strict=True)
    }


def _of(states, index):
    return [states[f"output_{index}"], states[f"cells_{index}"]]


def _feed_forward(layer, x, mask, training):
    if isinstance(layer, SparseMoE):
        return ops.sigmoid(layer(x, mask=mask, training=training))
    return ops.sigmoid(layer(x))
