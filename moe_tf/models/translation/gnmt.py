"""The paper's GNMT models, with and without experts."""

from collections.abc import Mapping

import keras
from keras import ops

from moe_tf.layers.attention import multi_head
from moe_tf.layers.recurrent import bidirectional as bidirectional_lstm
from moe_tf.layers.recurrent.attention_lstm import AttentionLSTM
from moe_tf.layers.recurrent.projected_lstm import ProjectedLSTMCell
from moe_tf.models import layer_specs as layers
from moe_tf.models.sigmoid_output import sigmoid_output
from moe_tf.models.translation import variants
from moe_tf.models.translation.base import TranslationModel
from moe_tf.models.translation.base import is_word
from moe_tf.types import Nest
from moe_tf.types import Tensor


@keras.saving.register_keras_serializable(package="moe_tf")
class Gnmt(TranslationModel):
    """Translates with projected LSTMs, attention, and experts between LSTMs.

    The encoder has three LSTM layers, the decoder two. Experts stand before
    the last layer of each. The bottom layer of the decoder attends to the
    source: the query is its output at the position before, and no other
    layer reads the context, as the paper's count of operations implies.
    The embeddings and each layer have dropout on their outputs, and each
    layer has a residual connection. The outputs of experts, and of the
    feed-forward net in their place, first pass a sigmoid. There are no
    biases, and three separate tables. LSTMs run over padding, which changes
    no position before it.

    The paper does not give its initial weights. They are Keras's defaults
    here and follow `keras.utils.set_random_seed`; `seed` is for dropout and
    noise.

    Example:

    >>> model = moe_tf.models.Gnmt(
    ...     "GNMT-MoE-4", 100, width=8, moe={"k": 2, "gating": "softmax_top_k"}
    ... )
    >>> source = np.array([[17, 5, 9, 3], [44, 3, 0, 0]])
    >>> tokens = np.array([[2, 21], [2, 8]])
    >>> model({"source": source, "tokens": tokens}).shape
    TensorShape([2, 2, 100])

    Args:
        variant: str, a `GNMT` name that `translation.variants.variant` knows,
            such as `"GNMT-MoE-32"`.
        vocabulary_size: int, `V`, with padding.
        width, cells, attention_units, encoder_layers, decoder_layers,
        bidirectional:
            optional sizes, see `translation.variants.variant`.
        attention_form: `"product"`, the paper's, or `"sum"`, GNMT's; see
            `AdditiveAttention`. Defaults to `"product"`.
        dropout: float. Defaults to `0.1`; the paper has 0.4 for single
            language pairs.
        moe: optional mapping, settings of the MoE layers. The keys are
            arguments of `SparseMoE`: `num_experts`, `k` and `hidden_units`,
            by default those of the variant; `gating`, `importance_weight`,
            `load_weight`, `capacity_factor`, `num_groups` and `recompute`,
            by default those of `SparseMoE`. The paper has loss weights of
            0.01.
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
        variant: str,
        vocabulary_size: int,
        *,
        width: int | None = None,
        cells: int | None = None,
        attention_units: int | None = None,
        encoder_layers: int | None = None,
        decoder_layers: int | None = None,
        bidirectional: bool | None = None,
        attention_form: str = "product",
        dropout: float = 0.1,
        moe: Mapping | None = None,
        seed: int | None = None,
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
            },
            dropout=dropout,
            moe=moe,
            seed=seed,
            **kwargs,
        )
        self.attention_form = attention_form
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
            if isinstance(layer, (layers.Experts, layers.FeedForward)):
                names = f"{side}_moe", f"{side}_feed_forward"
                made.append(self._make_net(layer, *names))
                continue
            made.append(self._make_lstm(layer, f"{side}_lstm_{num_lstms}"))
            num_lstms += 1
        return made

    def _make_lstm(self, layer, name):
        dtype = self.dtype_policy
        if isinstance(layer, layers.BidirectionalLstm):
            return bidirectional_lstm.BidirectionalLSTM(
                layer.units, dtype=dtype, name=name
            )
        cell = ProjectedLSTMCell(
            layer.units, self.variant.width, dtype=dtype, name="cell"
        )
        return keras.layers.RNN(
            cell, return_sequences=True, dtype=dtype, name=name
        )

    def _own_layers(self):
        return (
            *self.encoder_layers,
            self.attention_lstm,
            *self.decoder_layers,
        )

    def get_config(self):
        return {**super().get_config(), "attention_form": self.attention_form}

    def encode(self, source: Tensor, training: bool = False) -> Nest:
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
            x_BSD = self._add_residual(layer, x_BSD, mask_BS, training)
        keys_BSA = self.attention_lstm.attention.keys(x_BSD)
        return {"mask": mask_BS, "values": x_BSD, "keys": keys_BSA}

    def decode(
        self, tokens: Tensor, memory: Nest, training: bool = False
    ) -> Tensor:
        """Computes the input of the softmax.

        Args:
            tokens: int `(B, L)`.
            memory: result of `encode`.
            training: bool.

        Returns:
            Float `(B, L, D)`.
        """
        mask_BL = is_word(tokens)
        x_BLD = self._embed(self.target_embedding, tokens)
        x_BLD = self.dropout(x_BLD, training=training)
        y_BLD = self.attention_lstm(x_BLD, *_attended(memory))
        x_BLD += self.dropout(y_BLD, training=training)
        for layer in self.decoder_layers:
            x_BLD = self._add_residual(layer, x_BLD, mask_BL, training)
        return x_BLD

    def _add_residual(self, layer, x_BLD, mask_BL, training):
        """Computes `x + dropout(layer(x))`."""
        if isinstance(layer, keras.layers.RNN):
            y_BLD = bidirectional_lstm.run_rnn(layer, x_BLD, training)
        elif isinstance(layer, bidirectional_lstm.BidirectionalLSTM):
            y_BLD = layer(x_BLD, mask=mask_BL, training=training)
        else:
            y_BLD = sigmoid_output(layer, x_BLD, mask_BL, training)
        return x_BLD + self.dropout(y_BLD, training=training)

    def initial_states(self, memory: Nest, max_length: int) -> Nest:
        """Returns the states before the first target position, for `step`.

        Args:
            memory: result of `encode` for `N` sequences.
            max_length: int; an LSTM's states do not depend on it.

        Returns:
            Dict of, for each LSTM `i` of the decoder, `output_i`, float
            `(N, D)`, and `cells_i`, float `(N, H)`.
        """
        num_sequences = ops.shape(memory["mask"])[0]
        states = [self.attention_lstm.initial_states(num_sequences)]
        states += [
            layer.cell.get_initial_state(batch_size=num_sequences)
            for layer in self.decoder_layers
            if isinstance(layer, keras.layers.RNN)
        ]
        return _named(states)

    def step(
        self, tokens: Tensor, states: Nest, memory: Nest
    ) -> tuple[Tensor, Nest, Tensor]:
        """Reads one target word of every sequence, without dropout or noise.

        Args:
            tokens: int `(N,)`.
            states: those of `initial_states` or of the step before.
            memory: result of `encode` for `N` sequences.

        Returns:
            Logits of the next word, float32 `(N, V)`, the states, and the
            weights on the source, float32 `(N, S)`.
        """
        mask_N = is_word(tokens)
        x_ND = self._embed(self.target_embedding, tokens)
        y_ND, weight_NS, state = self.attention_lstm.step(
            x_ND, _state_of(states, 0), *_attended(memory)
        )
        x_ND += y_ND
        new_states = [state]
        for layer in self.decoder_layers:
            if isinstance(layer, keras.layers.RNN):
                y_ND, state = layer.cell(
                    x_ND, _state_of(states, len(new_states))
                )
                new_states.append(state)
            else:
                y_ND = sigmoid_output(layer, x_ND, mask_N, training=False)
            x_ND += y_ND
        return self.softmax.logits(x_ND), _named(new_states), weight_NS


def _attended(memory):
    """Returns the values, keys and bias that the attention reads."""
    bias_BS = multi_head.mask_bias(memory["mask"])
    return memory["values"], memory["keys"], bias_BS


def _named(states):
    """Puts the states of each LSTM under names of their own."""
    names = ("output", "cells")
    return {
        f"{name}_{index}": part
        for index, state in enumerate(states)
        for name, part in zip(names, state, strict=True)
    }


def _state_of(states, index):
    """Returns the states of one LSTM."""
    return [states[f"output_{index}"], states[f"cells_{index}"]]
