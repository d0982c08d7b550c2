"""Tokens and back-pointers of each position, and hypotheses traced from them.

A hypothesis' back-pointer is the index, among the hypotheses of the position
before, of the one that it continues.
"""

import typing

import tensorflow as tf

from moe_tf import special_ids
from moe_tf.types import Tensor


class History(typing.NamedTuple):
    """Arrays with one entry a position.

    Attributes:
        tokens: int32 `(B, M)`, the token of each hypothesis.
        parents: int32 `(B, M)`, back-pointers.
        attention: float32 `(B, M, S)`, of the hypotheses of the position
            before, with which they predicted; `()` if it is not kept.
    """

    tokens: tf.TensorArray
    parents: tf.TensorArray
    attention: tf.TensorArray | tuple[()]


def empty(num_positions: Tensor, keeps_attention: bool) -> History:
    """Returns a `History` with room for `num_positions`."""

    def array(dtype):
        return tf.TensorArray(dtype, size=num_positions)

    attention = array(tf.float32) if keeps_attention else ()
    return History(array(tf.int32), array(tf.int32), attention)


def append(
    history: History,
    position: Tensor,
    token_BM: Tensor,
    parent_BM: Tensor,
    attention_BMS: Tensor | None = None,
) -> History:
    """Returns the history with one position more."""
    attention = history.attention
    if attention != ():
        attention = attention.write(position, attention_BMS)
    return History(
        history.tokens.write(position, token_BM),
        history.parents.write(position, parent_BM),
        attention,
    )


def trace(
    history: History,
    num_positions: Tensor,
    length_BP: Tensor,
    parent_BP: Tensor,
    end_id: int,
) -> tuple[Tensor, Tensor | None]:
    """Follows the back-pointers of `P` finished hypotheses to their start.

    Args:
        history: `History`.
        num_positions: int32 scalar, how many were appended, 1 or more.
        length_BP: int32, lengths of the finished hypotheses; 0 for none.
        parent_BP: int32, back-pointers of their last token, `end_id`.
        end_id: int, their last token.

    Returns:
        `(token_BPI, attention_BPIS)`, 0 past the length; `I` is the largest
        length. Attention is `None` where it was not kept.
    """
    position_I = tf.range(num_positions)
    token_IBM = history.tokens.gather(position_I)
    parent_IBM = history.parents.gather(position_I)

    def step_back(carry, entry):
        _, beam_BP = carry
        position, token_BM, parent_BM = entry
        is_inner_BP = position < length_BP - 1
        token_BP = tf.gather(token_BM, beam_BP, batch_dims=1)
        token_BP = tf.where(is_inner_BP, token_BP, end_id)
        token_BP = tf.where(position < length_BP, token_BP, special_ids.PAD)
        before_BP = tf.gather(parent_BM, beam_BP, batch_dims=1)
        return token_BP, tf.where(is_inner_BP, before_BP, beam_BP)

    token_IBP, beam_IBP = tf.scan(
        step_back,
        (position_I, token_IBM, parent_IBM),
        initializer=(tf.zeros_like(parent_BP), parent_BP),
        reverse=True,
    )
    longest = tf.reduce_max(tf.concat([[0], tf.reshape(length_BP, [-1])], 0))
    token_BPI = tf.transpose(token_IBP[:longest], [1, 2, 0])
    if history.attention == ():
        return token_BPI, None
    attention_IBPS = tf.gather(
        history.attention.gather(position_I), beam_IBP, batch_dims=2
    )
    attention_BPIS = tf.where(
        tf.sequence_mask(length_BP, longest)[..., None],
        tf.transpose(attention_IBPS[:longest], [1, 2, 0, 3]),
        0.0,
    )
    return token_BPI, attention_BPIS
