"""Encoder and decoder blocks of a Transformer, with pre-normalisation.

Letters: `H` heads, `Q` width of one head.
"""

from collections.abc import Sequence

import keras
from keras import ops

from moe_tf.layers.attention.multi_head import CrossAttention
from moe_tf.layers.attention.multi_head import SelfAttention
from moe_tf.layers.moe import SparseMoE
from moe_tf.types import Tensor

_EPSILON = 1e-6


def _norm(layer, name):
    return keras.layers.LayerNormalization(
        epsilon=_EPSILON, dtype=layer.dtype_policy, name=name
    )


class _Block(keras.layers.Layer):
    """Base class of both blocks: self-attention and a feed-forward net."""

    def __init__(self, num_heads, feed_forward, dropout, seed, **kwargs):
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.feed_forward = feed_forward
        self.attention_norm = _norm(self, "attention_norm")
        self.attention = SelfAttention(
            num_heads, dtype=self.dtype_policy, name="attention"
        )
        self.feed_forward_norm = _norm(self, "feed_forward_norm")
        self.dropout = keras.layers.Dropout(
            dropout, seed=seed, dtype=self.dtype_policy, name="dropout"
        )
        self.seed = seed
        self.supports_masking = True

    def _build(self, layers, input_shape):
        for layer in layers:
            if not layer.built:
                layer.build(input_shape)

    def _feed_forward(self, x, mask, training):
        """Applies the feed-forward net to `x (..., D)` with `mask (...)`."""
        y = self.feed_forward_norm(x)
        if isinstance(self.feed_forward, SparseMoE):
            y = self.feed_forward(y, mask=mask, training=training)
        else:
            y = self.feed_forward(y)
        return x + self.dropout(y, training=training)

    def compute_output_shape(self, input_shape):
        return input_shape

    @classmethod
    def from_config(cls, config):
        layer = keras.saving.deserialize_keras_object(config["feed_forward"])
        return cls(**{**config, "feed_forward": layer})

    def get_config(self):
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "feed_forward": keras.saving.serialize_keras_object(
                self.feed_forward
            ),
            "dropout": self.dropout.rate,
            "seed": self.seed,
        }


@keras.saving.register_keras_serializable(package="moe_tf")
class EncoderBlock(_Block):
    """Self-attention and a feed-forward net, `x + dropout(part(norm(x)))`.

    Args:
        num_heads: int.
        feed_forward: layer, such as `FeedForward` or `SparseMoE`, used as it
            is, not copied.
        dropout: float. Defaults to `0.0`.
        seed: optional int for dropout.

    Call arguments:
        inputs: float `(B, S, D)`.
        bias: float that broadcasts to `(B, H, S, S)`: 0 where a position may
            be seen, -1e9 elsewhere.
        mask: optional bool `(B, S)`, `True` for tokens to be routed.
        training: bool.

    Returns:
        Float `(B, S, D)`.

    Example:

    >>> moe = moe_tf.SparseMoE(4, hidden_units=16, k=2)
    >>> block = moe_tf.layers.EncoderBlock(num_heads=2, feed_forward=moe)
    >>> x_BSD = np.ones((2, 3, 8), "float32")
    >>> tuple(block(x_BSD, bias=np.zeros((1, 1, 3, 3), "float32")).shape)
    (2, 3, 8)
    """

    def __init__(
        self,
        num_heads: int,
        feed_forward: keras.layers.Layer,
        dropout: float = 0.0,
        seed: int | None = None,
        **kwargs,
    ) -> None:
        super().__init__(num_heads, feed_forward, dropout, seed, **kwargs)

    def build(self, input_shape):
        parts = (
            self.attention_norm,
            self.attention,
            self.feed_forward_norm,
            self.feed_forward,
        )
        self._build(parts, input_shape)

    def call(self, inputs, bias, mask=None, training=False):
        y_BSD = self.attention(self.attention_norm(inputs), bias)
        x_BSD = inputs + self.dropout(y_BSD, training=training)
        return self._feed_forward(x_BSD, mask, training)


@keras.saving.register_keras_serializable(package="moe_tf")
class DecoderBlock(_Block):
    """Self-attention, attention to the source, and a feed-forward net.

    Args:
        num_heads: int.
        feed_forward: layer, such as `FeedForward` or `SparseMoE`, used as it
            is, not copied.
        dropout: float. Defaults to `0.0`.
        seed: optional int for dropout.

    Call arguments:
        inputs: float `(B, L, D)`.
        keys_and_values: two of float `(B, H, S, Q)`, the result of the method
            `keys_and_values`.
        bias: float that broadcasts to `(B, H, L, L)`: 0 where a position may
            be seen, -1e9 elsewhere.
        source_bias: float that broadcasts to `(B, H, L, S)`, likewise.
        mask: optional bool `(B, L)`, `True` for tokens to be routed.
        training: bool.

    Returns:
        Float `(B, L, D)`.

    Example:

    >>> net = moe_tf.layers.FeedForward([16])
    >>> block = moe_tf.layers.DecoderBlock(num_heads=2, feed_forward=net)
    >>> block.build((2, 3, 8))
    >>> y_BLD = block(
    ...     np.ones((2, 3, 8)),
    ...     block.keys_and_values(np.ones((2, 5, 8))),
    ...     bias=np.zeros((1, 1, 3, 3)),
    ...     source_bias=np.zeros((2, 1, 1, 5)),
    ... )
    >>> tuple(y_BLD.shape)
    (2, 3, 8)
    """

    def __init__(
        self,
        num_heads: int,
        feed_forward: keras.layers.Layer,
        dropout: float = 0.0,
        seed: int | None = None,
        **kwargs,
    ) -> None:
        super().__init__(num_heads, feed_forward, dropout, seed, **kwargs)
        self.source_norm = _norm(self, "source_norm")
        self.source_attention = CrossAttention(
            num_heads, dtype=self.dtype_policy, name="source_attention"
        )

    def build(self, input_shape):
        parts = (
            self.attention_norm,
            self.attention,
            self.source_norm,
            self.source_attention,
            self.feed_forward_norm,
            self.feed_forward,
        )
        self._build(parts, input_shape)

    def keys_and_values(self, memory_BSD: Tensor) -> list[Tensor]:
        """Projects the encoded source, float `(B, S, D)`.

        Returns:
            Keys and values of the attention to the source, each float
            `(B, H, S, Q)`.
        """
        return self.source_attention.keys_and_values(memory_BSD)

    def call(
        self,
        inputs,
        keys_and_values,
        bias,
        source_bias,
        mask=None,
        training=False,
    ):
        y_BLD = self.attention(self.attention_norm(inputs), bias)
        x_BLD = inputs + self.dropout(y_BLD, training=training)
        y_BLD, _ = self.source_attention(
            self.source_norm(x_BLD), *keys_and_values, source_bias
        )
        x_BLD += self.dropout(y_BLD, training=training)
        return self._feed_forward(x_BLD, mask, training)

    def step(
        self,
        x_ND: Tensor,
        state: Sequence[Tensor],
        keys_and_values: Sequence[Tensor],
        source_bias: Tensor,
        mask_N: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Computes one position, for inference.

        Args:
            x_ND: float, input at the position.
            state: index of the position, int `(N,)`, and the keys and values
                of earlier positions, float `(N, H, L, Q)`; see
                `SelfAttention.step`.
            keys_and_values, source_bias: as in the call.
            mask_N: bool, `True` for tokens to be routed.

        Returns:
            The output, float `(N, D)`, the new keys and values, and the mean
            over heads of the weights on the source, float32 `(N, S)`.
        """
        y_ND, key_NHLQ, value_NHLQ = self.attention.step(
            self.attention_norm(x_ND), *state
        )
        x_ND += y_ND
        y_NLD, weight_NHLS = self.source_attention(
            self.source_norm(x_ND)[:, None], *keys_and_values, source_bias
        )
        x_ND += y_NLD[:, 0]
        x_ND = self._feed_forward(x_ND, mask_N, training=False)
        weight_NS = ops.mean(weight_NHLS[:, :, 0], axis=1)
        return x_ND, key_NHLQ, value_NHLQ, weight_NS
