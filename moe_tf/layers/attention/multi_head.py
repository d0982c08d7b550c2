"""Dot-product attention of many heads, whole sequences or step by step.

Letters: `H` heads, `Q` width of one head, `S` positions attended to.
"""

import math

import keras
from keras import ops

from moe_tf import checks

_NEVER = -1e9


def mask_bias(mask):
    """What is added to scores: 0 where `mask` is `True`, else -1e9.

    After a softmax the latter is exactly 0; finite, so that a sequence of
    padding alone gets numbers and no NaN.

    Args:
        mask: bool `(...)`.

    Returns:
        Float32 `(...)`.
    """
    return ops.where(mask, 0.0, _NEVER)


def causal_bias(length):
    """`mask_bias` of no position seeing a later one, `(1, 1, L, L)`."""
    position_L = ops.arange(length)
    return mask_bias(position_L[None, :] <= position_L[:, None])[None, None]


def attention_weights(score, bias):
    """Softmax over the last axis of `score + bias`, float32 or wider."""
    wide = keras.backend.result_type(score.dtype, "float32")
    score = ops.cast(score, wide) + ops.cast(bias, wide)
    return ops.softmax(score, axis=-1)


def split_heads(x_BLX, num_parts, num_heads):
    """Cuts a projection into parts, as queries, keys and values.

    Args:
        x_BLX: float, `X = num_parts * H * Q`.
        num_parts: int.
        num_heads: int, `H`.

    Returns:
        `num_parts` tensors `(B, H, L, Q)`.
    """
    batch, length, width = ops.shape(x_BLX)
    head_width = width // (num_parts * num_heads)
    x = ops.reshape(x_BLX, (batch, length, num_parts, num_heads, head_width))
    return ops.unstack(ops.transpose(x, (2, 0, 3, 1, 4)), num_parts)


def attend(query_BHLQ, key_BHSQ, value_BHSQ, bias):
    """Attention of every head: `softmax(q k^T / sqrt(Q) + bias) v`.

    The softmax is float32 or wider.

    Args:
        query_BHLQ, key_BHSQ, value_BHSQ: float.
        bias: float, broadcast to `(B, H, L, S)`.

    Returns:
        Float `(B, L, H * Q)`, and the weights `(B, H, L, S)`.
    """
    batch, num_heads, length, head_width = ops.shape(query_BHLQ)
    query_BHLQ = query_BHLQ / math.sqrt(head_width)
    score_BHLS = ops.matmul(query_BHLQ, ops.swapaxes(key_BHSQ, -1, -2))
    weight_BHLS = attention_weights(score_BHLS, bias)
    y_BHLQ = ops.matmul(ops.cast(weight_BHLS, value_BHSQ.dtype), value_BHSQ)
    y_BLHQ = ops.transpose(y_BHLQ, (0, 2, 1, 3))
    return (
        ops.reshape(y_BLHQ, (batch, length, num_heads * head_width)),
        weight_BHLS,
    )


class _Attention(keras.layers.Layer):
    """Heads without biases; subclasses say what is projected together."""

    def __init__(self, num_heads, **kwargs):
        super().__init__(**kwargs)
        checks.at_least("num_heads", num_heads, 1)
        self.num_heads = num_heads
        self.supports_masking = True

    def _check_width(self, width):
        if width % self.num_heads:
            raise ValueError(
                "`num_heads` must divide the width of the inputs. "
                f"Received: num_heads={self.num_heads}, width={width}"
            )

    def _add_kernel(self, width, num_parts, name):
        return self.add_weight(
            shape=(width, num_parts * width),
            initializer="glorot_uniform",
            name=name,
        )

    def _project(self, x, kernel):
        # `step` runs outside of the call, where Keras casts nothing.
        return ops.matmul(x, ops.cast(kernel, self.compute_dtype))

    def get_config(self):
        return {**super().get_config(), "num_heads": self.num_heads}


@keras.saving.register_keras_serializable(package="moe_tf")
class SelfAttention(_Attention):
    """Attention of a sequence to itself, with one product for q, k and v.

    Args:
        num_heads: int, `H`; must divide the width.

    Call arguments:
        inputs: float `(B, L, D)`.
        bias: float that broadcasts to `(B, H, L, L)`, see `mask_bias`.

    Returns:
        Float `(B, L, D)`.

    Raises:
        ValueError: if `num_heads` is below 1 or does not divide `D`.

    Reference:
     - [Vaswani et al., 2017](https://arxiv.org/abs/1706.03762)
    """

    def build(self, input_shape):
        width = input_shape[-1]
        self._check_width(width)
        self.qkv_kernel = self._add_kernel(width, 3, "query_key_value_kernel")
        self.output_DD = self._add_kernel(width, 1, "output_kernel")

    def call(self, inputs, bias):
        projected = self._project(inputs, self.qkv_kernel)
        y_BLD, _ = attend(*split_heads(projected, 3, self.num_heads), bias)
        return self._project(y_BLD, self.output_DD)

    def step(self, x_ND, position_N, key_NHLQ, value_NHLQ):
        """Attends from one more position to all so far.

        Args:
            x_ND: float, what stands at the position.
            position_N: int, positions before it.
            key_NHLQ, value_NHLQ: those of earlier positions, of `L` at the
                most.

        Returns:
            Float `(N, D)`, and the keys and values with the position's.
        """
        projected = self._project(x_ND[:, None, :], self.qkv_kernel)
        query, key, value = split_heads(projected, 3, self.num_heads)
        at_L = ops.arange(ops.shape(key_NHLQ)[2])
        is_here = ops.equal(at_L, position_N[:, None])[:, None, :, None]
        key_NHLQ = ops.where(is_here, key, key_NHLQ)
        value_NHLQ = ops.where(is_here, value, value_NHLQ)
        bias = mask_bias(at_L <= position_N[:, None])[:, None, None, :]
        y_NLD, _ = attend(query, key_NHLQ, value_NHLQ, bias)
        return self._project(y_NLD, self.output_DD)[:, 0], key_NHLQ, value_NHLQ

    def compute_output_shape(self, input_shape):
        return input_shape


@keras.saving.register_keras_serializable(package="moe_tf")
class CrossAttention(_Attention):
    """Attention of one sequence to another, `memory`.

    Args:
        num_heads: int, `H`; must divide the width.

    Call arguments:
        inputs: float `(B, L, D)`.
        key_BHSQ, value_BHSQ: as `keys_and_values` gave them.
        bias: float that broadcasts to `(B, H, L, S)`, see `mask_bias`.

    Returns:
        Float `(B, L, D)`, and the weights, float32 `(B, H, L, S)`.

    Raises:
        ValueError: if `num_heads` is below 1 or does not divide `D`.

    Reference:
     - [Vaswani et al., 2017](https://arxiv.org/abs/1706.03762)
    """

    def build(self, input_shape):
        width = input_shape[-1]
        self._check_width(width)
        self.query_DD = self._add_kernel(width, 1, "query_kernel")
        self.key_value_kernel = self._add_kernel(width, 2, "key_value_kernel")
        self.output_DD = self._add_kernel(width, 1, "output_kernel")

    def keys_and_values(self, memory_BSD):
        """Float `(B, S, D)` to two of `(B, H, S, Q)`."""
        projected = self._project(memory_BSD, self.key_value_kernel)
        return split_heads(projected, 2, self.num_heads)

    def call(self, inputs, key_BHSQ, value_BHSQ, bias):
        projected = self._project(inputs, self.query_DD)
        (query_BHLQ,) = split_heads(projected, 1, self.num_heads)
        y_BLD, weight_BHLS = attend(query_BHLQ, key_BHSQ, value_BHSQ, bias)
        return self._project(y_BLD, self.output_DD), weight_BHLS
