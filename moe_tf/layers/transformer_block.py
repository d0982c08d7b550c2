"""Encoder and decoder blocks of a Transformer, normalised before each part.

Letters: `H` heads, `Q` width of one head.
"""

import keras
from keras import ops

from moe_tf.layers.attention.multi_head import CrossAttention
from moe_tf.layers.attention.multi_head import SelfAttention
from moe_tf.layers.moe import SparseMoE

_EPSILON = 1e-6


def _norm(layer, name):
    return keras.layers.LayerNormalization(
        epsilon=_EPSILON, dtype=layer.dtype_policy, name=name
    )


class _Block(keras.layers.Layer):
    """What both blocks have: the last part and how parts are joined."""

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
        """The last part, for `x (..., D)` and `mask (...)`."""
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
        feed_forward: layer, `FeedForward` or `SparseMoE`; taken, not copied.
        dropout: float. Defaults to `0.0`.
        seed: optional int for dropout.

    Call arguments:
        inputs: float `(B, S, D)`.
        bias: float that broadcasts to `(B, H, S, S)`; see
            `multi_head.mask_bias`.
        mask: optional bool `(B, S)`, positions to be routed.
        training: bool.

    Returns:
        Float `(B, S, D)`.
    """

    def __init__(
        self, num_heads, feed_forward, dropout=0.0, seed=None, **kwargs
    ):
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
        feed_forward: layer, `FeedForward` or `SparseMoE`; taken, not copied.
        dropout: float. Defaults to `0.0`.
        seed: optional int for dropout.

    Call arguments:
        inputs: float `(B, L, D)`.
        keys_and_values: two of `(B, H, S, Q)`, as the method of this name
            gave them.
        bias: float that broadcasts to `(B, H, L, L)`.
        source_bias: float that broadcasts to `(B, H, L, S)`.
        mask: optional bool `(B, L)`, positions to be routed.
        training: bool.

    Returns:
        Float `(B, L, D)`.
    """

    def __init__(
        self, num_heads, feed_forward, dropout=0.0, seed=None, **kwargs
    ):
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

    def keys_and_values(self, memory_BSD):
        """The source as this block attends to it, two of `(B, H, S, Q)`."""
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

    def step(self, x_ND, state, keys_and_values, source_bias, mask_N):
        """One position, for inference; equals `call` at that position.

        Args:
            x_ND: float.
            state: position, int `(N,)`, keys and values of the positions
                before, float `(N, H, L, Q)`; see `SelfAttention.step`.
            keys_and_values, source_bias: as in the call.
            mask_N: bool.

        Returns:
            Float `(N, D)`, the new keys and values, and the weights on the
            source, float32 `(N, S)`, the mean over heads.
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
