"""Sorting assignments by expert, and placing them in slots.

Both work on the last axis, with or without a first axis `G` of token groups.
Devices of a mesh sort and gather in their own groups.

Letters: `A = T * K` assignments, `N` blocks of `C` slots, `S = N * C` slots.
"""

import typing

import tensorflow as tf
from keras import ops

from moe_tf.dispatch.plan import cast_like
from moe_tf.dispatch.plan import size
from moe_tf.types import Tensor


class Sorted(typing.NamedTuple):
    """The assignments of a batch in the order of their experts.

    Attributes:
        expert_A: index, the expert of each assignment; `E` for none.
        order_A: index, the assignment in each row of the order.
        row_A: index, the row of each assignment: the inverse of `order_A`.
        count_E: index, how many assignments each expert has.
        offset_E: index, the row at which the assignments of an expert begin.
    """

    expert_A: Tensor
    order_A: Tensor
    row_A: Tensor
    count_E: Tensor
    offset_E: Tensor


def sort_by_expert(
    expert_TK: Tensor, num_experts: int, priority_TK: Tensor | None = None
) -> Sorted:
    """Sorts assignments by expert, stably.

    Args:
        expert_TK: index `(..., T, K)`, the experts that each token chose;
            `num_experts` for none.
        num_experts: int, `E`.
        priority_TK: optional float. The assignments of one expert are then in
            the order of their priority, the highest first. By default they
            are in the order of their tokens.
    """
    *leading, num_tokens, k = ops.shape(expert_TK)
    flat = *leading, num_tokens * k
    expert_A = ops.reshape(expert_TK, flat)
    if priority_TK is None:
        order_A = tf.argsort(expert_A, stable=True)
    else:
        first_A = tf.argsort(-ops.reshape(priority_TK, flat), stable=True)
        order_A = _pick(
            first_A, tf.argsort(_pick(expert_A, first_A), stable=True)
        )
    order_A = ops.cast(order_A, expert_A.dtype)
    count_E = ops.cast(_count(expert_TK, expert_A, num_experts), order_A.dtype)
    offset_E = ops.cast(ops.cumsum(count_E, axis=-1) - count_E, order_A.dtype)
    return Sorted(expert_A, order_A, _inverse(order_A), count_E, offset_E)


def place(
    assignments: Sorted,
    placed_E: Tensor,
    first_slot_E: Tensor,
    begin_N: Tensor,
    end_N: Tensor,
    block_size: int | Tensor,
) -> tuple[Tensor, Tensor]:
    """Places sorted assignments in blocks of slots, each of one expert.

    Args:
        assignments: `Sorted`.
        placed_E: index, how many assignments of each expert get a slot.
        first_slot_E: index, the slot of each expert's first assignment.
        begin_N: index, the row of the order in the first slot of each block.
        end_N: index, the row at which the rows of each block's expert end.
            Slots past that row are empty.
        block_size: int or scalar, `C`.

    Returns:
        `(assignment_S, slot_A)`: the assignment in each slot, `A` in empty
        slots, and the slot of each assignment, `S` for none.
    """
    expert_A, order_A, row_A, count_E, offset_E = assignments
    *leading, num_assignments = ops.shape(order_A)
    num_blocks = ops.shape(begin_N)[-1]
    num_slots = num_blocks * block_size
    num_assignments, num_slots = (
        cast_like(count, order_A) for count in (num_assignments, num_slots)
    )
    position_C = ops.arange(block_size, dtype=order_A.dtype)
    row_NC = begin_N[..., None] + position_C
    used_S, row_S = (
        ops.reshape(tensor, (*leading, num_blocks * block_size))
        for tensor in (row_NC < end_N[..., None], row_NC)
    )
    assignment_S = _pick(order_A, ops.where(used_S, row_S, 0))
    assignment_S = ops.where(used_S, assignment_S, num_assignments)

    num_experts = count_E.shape[-1]
    known_A = ops.minimum(expert_A, num_experts - 1)
    placed_A = ops.logical_and(
        expert_A < num_experts, row_A < _pick(offset_E + placed_E, known_A)
    )
    slot_A = row_A + _pick(first_slot_E - offset_E, known_A)
    return assignment_S, ops.where(placed_A, slot_A, num_slots)


def _pick(x_AX, index_AY):
    return tf.gather(x_AX, index_AY, batch_dims=len(index_AY.shape) - 1)


def _inverse(order_A):
    """The inverse of a permutation."""
    if len(order_A.shape) > 1:  # A scatter would cross the devices of a mesh.
        return ops.cast(tf.argsort(order_A, stable=True), order_A.dtype)
    num_assignments = size(order_A)
    return tf.scatter_nd(
        order_A[:, None],
        ops.arange(num_assignments, dtype=order_A.dtype),
        ops.cast([num_assignments], order_A.dtype),
    )


def _count(expert_TK, expert_A, num_experts):
    """How many assignments each expert has, int32 `(..., E)`."""
    if len(expert_A.shape) == 1:
        # Of int32, for which GPUs have these sums; of int64 they have not.
        counts = ops.segment_sum(
            ops.ones_like(expert_A, dtype="int32"),
            expert_A,
            num_segments=num_experts + 1,
        )
        return counts[:num_experts]

    def count_choice(j):
        # Floats, exact to 2^24, since GPUs leave sums of int32 to the host.
        chosen_TE = ops.one_hot(expert_TK[..., j], num_experts, dtype="float32")
        return ops.cast(ops.sum(chosen_TE, axis=-2), "int32")

    return sum(count_choice(j) for j in range(expert_TK.shape[-1]))
