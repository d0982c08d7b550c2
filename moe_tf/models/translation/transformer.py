"""A Transformer for translation, dense or with experts."""

import math

import keras
from keras import ops

from moe_tf.layers.attention import multi_head
from moe_tf.layers.feed_forward import FeedForward
from moe_tf.layers.transformer_block import DecoderBlock
from moe_tf.layers.transformer_block import EncoderBlock
from moe_tf.models import layer_specs as layers
from moe_tf.models.translation import variants
from moe_tf.models.translation.base import TranslationModel
from moe_tf.models.translation.base import is_word


def sinusoids(positions, width):
    """Sines and cosines of geometric wave lengths, first halves then second.

    Args:
        positions: int, any shape.
        width: int, `D`; if it is odd the last column is 0.

    Returns:
        Float32 `(..., D)`.

    Reference:
     - [Vaswani et al., 2017](https://arxiv.org/abs/1706.03762), section 3.5
    """
    half = width // 2
    step = math.log(10_000.0) / max(half - 1, 1)
    rates = ops.exp(-step * ops.arange(half, dtype="float32"))
    angles = ops.cast(positions, "float32")[..., None] * rates
    waves = [ops.sin(angles), ops.cos(angles)]
    if width % 2:
        waves.append(ops.zeros_like(angles[..., :1]))
    return ops.concatenate(waves, axis=-1)


@keras.saving.register_keras_serializable(package="moe_tf")
class Transformer(TranslationModel):
    """Translates with attention alone, its layers normalised before.

    `x + dropout(part(norm(x)))` for attention and feed-forward nets, a norm
    at the end of encoder and decoder, sinusoids for positions. Matrices have
    no biases, so that experts and feed-forward nets are alike. Dropout also
    on the embeddings; none on attention weights and hidden units.

    Matrices start by `glorot_uniform`, queries, keys and values as one;
    embeddings from a normal distribution of variance `1 / D`, and are scaled
    by `sqrt(D)`. They follow `keras.utils.set_random_seed`; `seed` is for
    dropout and noise.

    Args:
        variant: str, `"Transformer"` or `"Transformer-MoE-<n>"`.
        vocabulary_size: int, `V`, with padding.
        width, num_heads, feed_forward, encoder_layers, decoder_layers,
        expert_hidden, k, moe_every, tie_embeddings:
            optional sizes, see `translation.variants.variant`.
        dropout: float. Defaults to `0.1`.
        gating, importance_weight, load_weight, capacity_factor, num_groups,
        recompute:
            see `SparseMoE`.
        seed: optional int.

    Call arguments:
        inputs: dict of `source`, int `(B, S)`, and `tokens`, int `(B, L)`.
        training: bool.

    Returns:
        Logits of the word after each token, float32 `(B, L, V)`.

    Raises:
        ValueError: if no variant has this name, or a setting does not fit.

    Reference:
     - [Vaswani et al., 2017](https://arxiv.org/abs/1706.03762)
    """

    architecture = variants.TRANSFORMER

    def __init__(
        self,
        variant,
        vocabulary_size,
        *,
        width=None,
        num_heads=None,
        feed_forward=None,
        encoder_layers=None,
        decoder_layers=None,
        expert_hidden=None,
        k=None,
        moe_every=None,
        tie_embeddings=None,
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
        sizes = {
            "width": width,
            "num_heads": num_heads,
            "feed_forward": feed_forward,
            "encoder_layers": encoder_layers,
            "decoder_layers": decoder_layers,
            "expert_hidden": expert_hidden,
            "k": k,
            "moe_every": moe_every,
            "tie_embeddings": tie_embeddings,
        }
        moe = {
            "gating": gating,
            "importance_weight": importance_weight,
            "load_weight": load_weight,
            "capacity_factor": capacity_factor,
            "num_groups": num_groups,
            "recompute": recompute,
        }
        width = variants.variant(variant, **sizes).width
        super().__init__(
            variant,
            vocabulary_size,
            sizes=sizes,
            settings={"dropout": dropout, "seed": seed},
            moe=moe,
            table_initializer=keras.initializers.RandomNormal(
                stddev=width**-0.5
            ),
            **kwargs,
        )
        self.encoder_blocks, self.decoder_blocks = (
            self._make_blocks(kind, name, stack)
            for kind, name, stack in (
                (EncoderBlock, "encoder", self.variant.encoder),
                (DecoderBlock, "decoder", self.variant.decoder),
            )
        )
        self.encoder_norm, self.decoder_norm = (
            keras.layers.LayerNormalization(
                epsilon=1e-6, dtype=self.dtype_policy, name=name
            )
            for name in ("encoder_norm", "decoder_norm")
        )

    def _make_blocks(self, kind, name, stack):
        nets = [
            layer
            for layer in stack
            if isinstance(layer, (layers.FeedForward, layers.Experts))
        ]
        blocks = []
        for index, net in enumerate(nets):
            if isinstance(net, layers.Experts):
                part = self._make_experts(net, f"{name}_{index}_moe")
            else:
                part = FeedForward(
                    net.hidden_units,
                    dtype=self.dtype_policy,
                    name="feed_forward",
                )
            blocks.append(
                kind(
                    stack[1].num_heads,
                    part,
                    self.dropout.rate,
                    seed=next(self._seeds),
                    dtype=self.dtype_policy,
                    name=f"{name}_{index}",
                )
            )
        return blocks

    def _build_layers(self, shape):
        for layer in (
            *self.encoder_blocks,
            self.encoder_norm,
            *self.decoder_blocks,
            self.decoder_norm,
        ):
            if not layer.built:
                layer.build(shape)

    def encode(self, source, training=False):
        """Reads the source.

        Args:
            source: int `(B, S)`.
            training: bool.

        Returns:
            Dict of `mask`, bool `(B, S)`, and for each decoder block `i`
            `keys_i` and `values_i`, float `(B, H, S, Q)`.
        """
        mask_BS = is_word(source)
        bias = _source_bias(mask_BS)
        x_BSD = self._read(self.source_embedding, source)
        x_BSD = self.dropout(x_BSD, training=training)
        for block in self.encoder_blocks:
            x_BSD = block(x_BSD, bias, mask=mask_BS, training=training)
        x_BSD = self.encoder_norm(x_BSD)
        memory = {"mask": mask_BS}
        for index, block in enumerate(self.decoder_blocks):
            keys, values = block.keys_and_values(x_BSD)
            memory |= {f"keys_{index}": keys, f"values_{index}": values}
        return memory

    def decode(self, tokens, memory, training=False):
        """What the softmax sees: int `(B, L)` to float `(B, L, D)`."""
        source_bias = _source_bias(memory["mask"])
        bias = multi_head.causal_bias(ops.shape(tokens)[1])
        mask_BL = is_word(tokens)
        x_BLD = self._read(self.target_embedding, tokens)
        x_BLD = self.dropout(x_BLD, training=training)
        for index, block in enumerate(self.decoder_blocks):
            x_BLD = block(
                x_BLD,
                (memory[f"keys_{index}"], memory[f"values_{index}"]),
                bias,
                source_bias,
                mask=mask_BL,
                training=training,
            )
        return self.decoder_norm(x_BLD)

    def initial_states(self, memory, max_length):
        """States before the first target position, for `step`.

        Args:
            memory: as `encode` gave it, of `N` rows.
            max_length: int, most positions.

        Returns:
            Dict of `position`, int32 `(N,)`, and for each decoder block `i`
            `keys_i` and `values_i`, float `(N, H, max_length, Q)`.
        """
        num_rows, num_heads, _, head_width = ops.shape(memory["keys_0"])
        zeros = ops.zeros(
            (num_rows, num_heads, max_length, head_width),
            dtype=self.compute_dtype,
        )
        states = {"position": ops.zeros((num_rows,), dtype="int32")}
        for index in range(len(self.decoder_blocks)):
            states |= {f"keys_{index}": zeros, f"values_{index}": zeros}
        return states

    def step(self, tokens, states, memory):
        """Reads one target word of every row, without dropout or noise.

        Args:
            tokens: int `(N,)`.
            states: as `initial_states` or the step before gave them.
            memory: as `encode` gave it, of `N` rows.

        Returns:
            Logits of the next word, float32 `(N, V)`, the states, and the
            last block's weights on the source, float32 `(N, S)`, the mean
            over heads.
        """
        mask_N, position_N = is_word(tokens), states["position"]
        source_bias = _source_bias(memory["mask"])
        x_ND = self._read(self.target_embedding, tokens, position_N)
        new_states = {"position": position_N + 1}
        for index, block in enumerate(self.decoder_blocks):
            names = keys, values = f"keys_{index}", f"values_{index}"
            state = (position_N, *(states[name] for name in names))
            x_ND, new_states[keys], new_states[values], weight_NS = block.step(
                x_ND,
                state,
                tuple(memory[name] for name in names),
                source_bias,
                mask_N,
            )
        logits_NV = self.softmax.logits(self.decoder_norm(x_ND))
        return logits_NV, new_states, weight_NS

    def _read(self, table, tokens, positions=None):
        """Embeddings with their positions, by default 0, 1, 2, ..."""
        if positions is None:
            positions = ops.arange(ops.shape(tokens)[-1])
        width = self.variant.width
        x = self._embed(table, tokens) * math.sqrt(width)
        return x + ops.cast(sinusoids(positions, width), x.dtype)


def _source_bias(mask_BS):
    return multi_head.mask_bias(mask_BS)[:, None, None, :]
