"""Sending tokens to experts and bringing their answers back.

A plan numbers the slots in which experts work, expert by expert, and says
which assignment (the `j`-th choice of token `t` is assignment `t * K + j`)
sits in which slot. `dispatch` and `combine` then only gather: each is the
other's transpose, so their gradients are gathers of the same two tables, and
no activation is ever scattered.

Letters: `A = T * K` assignments, `S` slots, `N` blocks of `C` slots.
"""

import math

import tensorflow as tf
from keras import ops

from moe_tf.dispatch import plans

# Columns of choices that are summed without a loop.
_UNROLLED = 16


def dispatch(x_TD, plan):
    """The tokens in the slots, `(S, D)`; zeros in empty slots.

    With `Groups` this and `combine` take and give all with a first axis `G`.
    """

    @tf.custom_gradient
    def gather(x_TD):
        def gradient(dx_SD):
            return _sum_columns(
                lambda j: _take(dx_SD, plan.slot_TK[..., j], plan), plan
            )

        return _take(x_TD, tokens(plan), plan), gradient

    return gather(x_TD)


def combine(y_SD, weight_TK, plan):
    """Weighted sum of each token's answers, equation 1: `(T, D)`.

    An assignment without a slot adds nothing.
    """

    @tf.custom_gradient
    def weighted_sum(y_SD, weight_TK):
        def gradient(dy_TD):
            dy_SD = _take(dy_TD, tokens(plan), plan)
            *leading, rows, columns = ops.shape(weight_TK)
            weight_A = ops.reshape(weight_TK, (*leading, rows * columns))
            weight_S = _take(weight_A, plan.assignment_S, plan)
            dweight_S = ops.sum(dy_SD * y_SD, axis=-1)
            dweight_TK = _take(dweight_S, plan.slot_TK, plan)
            return dy_SD * weight_S[..., None], dweight_TK

        def column(j):
            answer_TD = _take(y_SD, plan.slot_TK[..., j], plan)
            return weight_TK[..., j, None] * answer_TD

        return _sum_columns(column, plan), gradient

    return weighted_sum(y_SD, weight_TK)


def tokens(plan):
    """The token in each slot; one past the last in empty slots."""
    k = ops.shape(plan.slot_TK)[-1]
    return plan.assignment_S // plans.cast_like(k, plan.assignment_S)


def collect(y_SD, plan):
    """The answers of each token, `(T, K, D)`; zeros where one has no slot."""

    @tf.custom_gradient
    def gather(y_SD):
        def gradient(dy_TKD):
            dy_AD = ops.reshape(dy_TKD, (-1, dy_TKD.shape[-1]))
            return _take(dy_AD, plan.assignment_S, plan)

        return _take(y_SD, plan.slot_TK, plan), gradient

    return gather(y_SD)


def _take(x, index, plan):
    """Rows of `x` at `index`; zeros where `index` is past the last row."""
    if isinstance(plan, plans.Rows):
        return tf.gather(x, index)
    axis = 1 if isinstance(plan, plans.Groups) else 0
    num_rows = plans.cast_like(ops.shape(x)[axis], index)
    rows = tf.gather(x, ops.minimum(index, num_rows - 1), batch_dims=axis)
    found = index < num_rows
    for _ in range(len(rows.shape) - len(found.shape)):
        found = found[..., None]
    return ops.where(found, rows, ops.zeros((), dtype=rows.dtype))


def _sum_columns(column, plan):
    """`column(0) + column(1) + ...` over the choices of a token.

    A sum over `k` gathers costs half of one gather of `(T, K, D)`. Where the
    number of columns is not fixed, or large because a token may have any
    number of experts, only those that some token uses are run through.
    """
    k = plan.slot_TK.shape[-1]
    if k is not None and k <= _UNROLLED:
        return sum(column(j) for j in range(k))
    if isinstance(plan, plans.Groups):
        last = k
    else:
        num_slots = plans.cast_like(_size(plan.assignment_S), plan.slot_TK)
        used_K = ops.any(plan.slot_TK < num_slots, axis=0)
        column_K = ops.arange(1, ops.shape(used_K)[0] + 1, dtype="int32")
        last = ops.max(ops.where(used_K, column_K, 0), initial=0)
    _, total = tf.while_loop(
        lambda j, total: j < last,
        lambda j, total: (j + 1, total + column(j)),
        (1, column(0)),
    )
    return total


def _size(x):
    """Number of entries: an int where the shape is known, else a tensor."""
    return math.prod(ops.shape(x))
