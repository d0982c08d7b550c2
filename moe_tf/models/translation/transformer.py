"""A Transformer for translation, dense or with experts."""

import math
from collections.abc import Mapping

import keras
from keras import ops

from moe_tf.layers.attention import multi_head
from moe_tf.layers.transformer_block import DecoderBlock
from moe_tf.layers.transformer_block import EncoderBlock
from moe_tf.models import layer_specs as layers
from moe_tf.models.translation import variants
from moe_tf.models.translation.base import TranslationModel
from moe_tf.models.translation.base import is_word
from moe_tf.types import Nest
from moe_tf.types import Tensor


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """Encodes positions by sines and cosines of geometric wave lengths.

    The first half of the columns has the sines, the second the cosines.

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
    """Translates with attention instead of LSTMs (a pre-norm Transformer).

    Attention and feed-forward nets are residual, `x + dropout(f(norm(x)))`.
    Encoder and decoder end with a norm; positions are sinusoids. Matrices
    have no biases, as those of experts do not. The embeddings have dropout
    too; attention weights and hidden units have none.

    Matrices start by `glorot_uniform`, those of queries, keys and values as
    one matrix. Embeddings start from a normal distribution of variance
    `1 / D` and are scaled by `sqrt(D)`. Initial weights follow
    `keras.utils.set_random_seed`; `seed` is for dropout and noise.

    Example:

    >>> model = moe_tf.models.Transformer(
    ...     "Transformer-MoE-4", 100, width=8, num_heads=2, encoder_layers=2,
    ...     decoder_layers=2, moe={"k": 2, "hidden_units": 16},
    ... )
    >>> source = np.array([[17, 5, 9, 3], [44, 3, 0, 0]])
    >>> tokens = np.array([[2, 21], [2, 8]])
    >>> model({"source": source, "tokens": tokens}).shape
    TensorShape([2, 2, 100])

    Args:
        variant: str, `"Transformer"` or `"Transformer-MoE-<n>"`.
        vocabulary_size: int, `V`, with padding.
        width, num_heads, feed_forward, encoder_layers, decoder_layers,
        moe_every, tie_embeddings:
            optional sizes, see `translation.variants.variant`.
        dropout: float. Defaults to `0.1`.
        moe: optional mapping, settings of the MoE layers. The keys are
            arguments of `SparseMoE`: `num_experts`, `k` and `hidden_units`,
            by default those of the variant; `gating`, `importance_weight`,
            `load_weight`, `capacity_factor`, `num_groups` and `recompute`,
            by default those of `SparseMoE`.
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
        variant: str,
        vocabulary_size: int,
        *,
        width: int | None = None,
        num_heads: int | None = None,
        feed_forward: int | None = None,
        encoder_layers: int | None = None,
        decoder_layers: int | None = None,
        moe_every: int | None = None,
        tie_embeddings: bool | None = None,
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
                "num_heads": num_heads,
                "feed_forward": feed_forward,
                "encoder_layers": encoder_layers,
                "decoder_layers": decoder_layers,
                "moe_every": moe_every,
                "tie_embeddings": tie_embeddings,
            },
            dropout=dropout,
            moe=moe,
            seed=seed,
            **kwargs,
        )
        self.encoder_blocks, self.decoder_blocks = (
            self._make_blocks(block_class, name, stack)
            for block_class, name, stack in (
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

    def _table_initializer(self):
        return keras.initializers.RandomNormal(stddev=self.variant.width**-0.5)

    def _make_blocks(self, block_class, name, stack):
        nets = [
            layer
            for layer in stack
            if isinstance(layer, (layers.FeedForward, layers.Experts))
        ]
        return [
            block_class(
                stack[1].num_heads,
                self._make_net(net, f"{name}_{index}_moe", "feed_forward"),
                self.dropout.rate,
                seed=next(self._seeds),
                dtype=self.dtype_policy,
                name=f"{name}_{index}",
            )
            for index, net in enumerate(nets)
        ]

    def _own_layers(self):
        return (
            *self.encoder_blocks,
            self.encoder_norm,
            *self.decoder_blocks,
            self.decoder_norm,
        )

    def encode(self, source: Tensor, training: bool = False) -> Nest:
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
        x_BSD = self._embed_positions(self.source_embedding, source)
        x_BSD = self.dropout(x_BSD, training=training)
        for block in self.encoder_blocks:
            x_BSD = block(x_BSD, bias, mask=mask_BS, training=training)
        x_BSD = self.encoder_norm(x_BSD)
        memory = {"mask": mask_BS}
        for index, block in enumerate(self.decoder_blocks):
            keys, values = block.keys_and_values(x_BSD)
            memory |= {f"keys_{index}": keys, f"values_{index}": values}
        return memory

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
        source_bias = _source_bias(memory["mask"])
        bias = multi_head.causal_bias(ops.shape(tokens)[1])
        mask_BL = is_word(tokens)
        x_BLD = self._embed_positions(self.target_embedding, tokens)
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

    def initial_states(self, memory: Nest, max_length: int) -> Nest:
        """Returns the states before the first target position, for `step`.

        Args:
            memory: result of `encode` for `N` sequences.
            max_length: int, upper limit of the number of positions.

        Returns:
            Dict of `position`, int32 `(N,)`, and for each decoder block `i`
            `keys_i` and `values_i`, float `(N, H, max_length, Q)`.
        """
        num_sequences, num_heads, _, head_width = ops.shape(memory["keys_0"])
        zeros = ops.zeros(
            (num_sequences, num_heads, max_length, head_width),
            dtype=self.compute_dtype,
        )
        states = {"position": ops.zeros((num_sequences,), dtype="int32")}
        for index in range(len(self.decoder_blocks)):
            states |= {f"keys_{index}": zeros, f"values_{index}": zeros}
        return states

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
            last block's weights on the source, float32 `(N, S)`, the mean
            over heads.
        """
        mask_N, position_N = is_word(tokens), states["position"]
        source_bias = _source_bias(memory["mask"])
        x_ND = self._embed_positions(self.target_embedding, tokens, position_N)
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

    def _embed_positions(self, table, tokens, positions=None):
        """Adds positions, by default 0, 1, 2, ..., to scaled embeddings."""
        if positions is None:
            positions = ops.arange(ops.shape(tokens)[-1])
        width = self.variant.width
        x = self._embed(table, tokens) * math.sqrt(width)
        return x + ops.cast(sinusoids(positions, width), x.dtype)


def _source_bias(mask_BS):
    return multi_head.mask_bias(mask_BS)[:, None, None, :]
