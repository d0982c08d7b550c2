"""Multi-head dot-product attention, for whole sequences or step by step.

Letters: `H` heads, `Q` width of one head, `S` positions attended to.
"""

import math

import keras
from keras import ops

from moe_tf import checks
from moe_tf.types import Tensor

_MASKED = -1e9


def mask_bias(mask: Tensor) -> Tensor:
    """Returns the bias of attention scores: 0 where `mask` is `True`, or -1e9.

    The softmax of -1e9 is exactly 0. The bias is finite, so that a sequence
    of padding alone gives no NaN.

    Args:
        mask: bool `(...)`.

    Returns:
        Float32 `(...)`.
    """
    return ops.where(mask, 0.0, _MASKED)


def causal_bias(length: int | Tensor) -> Tensor:
    """Returns the bias that hides later positions, float32 `(1, 1, L, L)`."""
    position_L = ops.arange(length)
    return mask_bias(position_L[None, :] <= position_L[:, None])[None, None]


def attention_weights(score: Tensor, bias: Tensor) -> Tensor:
    """Computes the softmax of `score + bias` over the last axis.

    Args:
        score: float `(..., S)`.
        bias: float, broadcast to the shape of `score`.

    Returns:
        Float32 `(..., S)`, or float64 for float64 scores.
    """
    dtype = keras.backend.result_type(score.dtype, "float32")
    score = ops.cast(score, dtype) + ops.cast(bias, dtype)
    return ops.softmax(score, axis=-1)


def split_heads(x_BLX: Tensor, num_parts: int, num_heads: int) -> list[Tensor]:
    """Splits a projection into parts, such as queries, keys and values.

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


def attend(
    query_BHLQ: Tensor, key_BHSQ: Tensor, value_BHSQ: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Computes `softmax(q k^T / sqrt(Q) + bias) v` for every head.

    The softmax is float32 or a higher precision.

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
    """Base class of multi-head attention without projection biases."""

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
        # `step` runs outside of `call`, where Keras casts no weights.
        return ops.matmul(x, ops.cast(kernel, self.compute_dtype))

    def get_config(self):
        return {**super().get_config(), "num_heads": self.num_heads}


@keras.saving.register_keras_serializable(package="moe_tf")
class SelfAttention(_Attention):
    """Attention of a sequence to itself, with one kernel for q, k and v.

    Args:
        num_heads: int, `H`; must divide the width.

    Call arguments:
        inputs: float `(B, L, D)`.
        bias: float that broadcasts to `(B, H, L, L)`: 0 where a position may
            be seen, -1e9 elsewhere.

    Returns:
        Float `(B, L, D)`.

    Raises:
        ValueError: if `num_heads` is below 1 or does not divide `D`.

    Reference:
     - [Vaswani et al., 2017](https://arxiv.org/abs/1706.03762)

    Example:

    >>> attention = moe_tf.layers.SelfAttention(num_heads=2)
    >>> x_BLD = np.ones((2, 3, 8), "float32")
    >>> tuple(attention(x_BLD, bias=np.zeros((1, 1, 3, 3))).shape)
    (2, 3, 8)
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

    def step(
        self,
        x_ND: Tensor,
        position_N: Tensor,
        key_NHLQ: Tensor,
        value_NHLQ: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attends from one position to itself and all earlier positions.

        Args:
            x_ND: float, input at the position.
            position_N: int, index of the position.
            key_NHLQ, value_NHLQ: float, keys and values of the earlier
                positions, in arrays of `L` positions.

        Returns:
            The output, float `(N, D)`, and the keys and values with those of
            this position written to them.
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
        key_BHSQ, value_BHSQ: float, the result of `keys_and_values`.
        bias: float that broadcasts to `(B, H, L, S)`: 0 where a position may
            be seen, -1e9 elsewhere.

    Returns:
        Float `(B, L, D)`, and the weights, float32 `(B, H, L, S)`.

    Raises:
        ValueError: if `num_heads` is below 1 or does not divide `D`.

    Reference:
     - [Vaswani et al., 2017](https://arxiv.org/abs/1706.03762)

    Example:

    >>> attention = moe_tf.layers.CrossAttention(num_heads=2)
    >>> attention.build((2, 3, 8))
    >>> key_BHSQ, value_BHSQ = attention.keys_and_values(np.ones((2, 5, 8)))
    >>> bias = np.zeros((2, 1, 1, 5))
    >>> y_BLD, weight_BHLS = attention(
    ...     np.ones((2, 3, 8)), key_BHSQ, value_BHSQ, bias
    ... )
    >>> tuple(y_BLD.shape), tuple(weight_BHLS.shape)
    ((2, 3, 8), (2, 2, 3, 5))
    """

    def build(self, input_shape):
        width = input_shape[-1]
        self._check_width(width)
        self.query_DD = self._add_kernel(width, 1, "query_kernel")
        self.key_value_kernel = self._add_kernel(width, 2, "key_value_kernel")
        self.output_DD = self._add_kernel(width, 1, "output_kernel")

    def keys_and_values(self, memory_BSD: Tensor) -> list[Tensor]:
        """Projects the memory, float `(B, S, D)`.

        Returns:
            The keys and the values, each float `(B, H, S, Q)`.
        """
        projected = self._project(memory_BSD, self.key_value_kernel)
        return split_heads(projected, 2, self.num_heads)

    def call(self, inputs, key_BHSQ, value_BHSQ, bias):
        projected = self._project(inputs, self.query_DD)
        (query_BHLQ,) = split_heads(projected, 1, self.num_heads)
        y_BLD, weight_BHLS = attend(query_BHLQ, key_BHSQ, value_BHSQ, bias)
        return self._project(y_BLD, self.output_DD), weight_BHLS
