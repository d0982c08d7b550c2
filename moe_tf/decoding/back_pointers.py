"""What a beam search remembers of each position, and the way back."""

import typing

import tensorflow as tf

from moe_tf import special_ids


class History(typing.NamedTuple):
    """Arrays with one entry a position.

    Attributes:
        tokens: int32 `(B, M)`, the tokens that lived on.
        slots: int32 `(B, M)`, where in the beam before it each came from.
        attention: float32 `(B, M, S)`, of the beam before it; `()` if it is
            not kept.
    """

    tokens: tf.TensorArray
    slots: tf.TensorArray
    attention: typing.Any


def empty(num_positions, keeps_attention):
    """A `History` with room for `num_positions`."""

    def array(dtype):
        return tf.TensorArray(dtype, size=num_positions)

    attention = array(tf.float32) if keeps_attention else ()
    return History(array(tf.int32), array(tf.int32), attention)


def append(history, position, token_BM, slot_BM, attention_BMS=None):
    """The history with one position more."""
    attention = history.attention
    if attention != ():
        attention = attention.write(position, attention_BMS)
    return History(
        history.tokens.write(position, token_BM),
        history.slots.write(position, slot_BM),
        attention,
    )


def trace(history, num_positions, length_BP, slot_BP, end_id):
    """Follows finished hypotheses back to their start.

    Args:
        history: `History`.
        num_positions: int32 scalar, how many were appended, 1 or more.
        length_BP: int32, lengths of the finished hypotheses; 0 for none.
        slot_BP: int32, where in the beam they were before `end_id`.
        end_id: int, their last token.

    Returns:
        `(token_BPI, attention_BPIS)`, 0 past the length; `I` is the largest
        length. Attention is `None` where it was not kept.
    """
    written_I = tf.range(num_positions)
    token_IBM = history.tokens.gather(written_I)
    came_from_IBM = history.slots.gather(written_I)

    def back(carry, now):
        _, at_BP = carry
        position, token_BM, came_from_BM = now
        lived_BP = position < length_BP - 1
        token_BP = tf.gather(token_BM, at_BP, batch_dims=1)
        token_BP = tf.where(lived_BP, token_BP, end_id)
        token_BP = tf.where(position < length_BP, token_BP, special_ids.PAD)
        before_BP = tf.gather(came_from_BM, at_BP, batch_dims=1)
        return token_BP, tf.where(lived_BP, before_BP, at_BP)

    token_IBP, slot_IBP = tf.scan(
        back,
        (written_I, token_IBM, came_from_IBM),
        initializer=(tf.zeros_like(slot_BP), slot_BP),
        reverse=True,
    )
    longest = tf.reduce_max(tf.concat([[0], tf.reshape(length_BP, [-1])], 0))
    token_BPI = tf.transpose(token_IBP[:longest], [1, 2, 0])
    if history.attention == ():
        return token_BPI, None
    attention_IBPS = tf.gather(
        history.attention.gather(written_I), slot_IBP, batch_dims=2
    )
    attention_BPIS = tf.where(
        tf.sequence_mask(length_BP, longest)[..., None],
        tf.transpose(attention_IBPS[:longest], [1, 2, 0, 3]),
        0.0,
    )
    return token_BPI, attention_BPIS
