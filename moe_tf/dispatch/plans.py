"""Plans: which slot every assignment of a token to an expert gets.

A plan numbers the slots in which experts work, expert by expert, and says
which assignment (the `j`-th choice of token `t` is assignment `t * K + j`)
sits in which slot. `dispatch` moves tokens by it.

Tables are int32, or int64 where `numbers` makes them so.

Letters: `A = T * K` assignments, `S` slots, `N` blocks of `C` slots.
"""

import math
import typing

import tensorflow as tf
from keras import ops

from moe_tf import xla


class Rows(typing.NamedTuple):
    """A plan in which every assignment has a slot and no slot is empty.

    Slots lie expert by expert, `count_E` of each, those of masked tokens
    last.

    Attributes:
        assignment_S: the assignment in each slot.
        slot_TK: the slot of each assignment.
        count_E: int32, how many tokens chose each expert.
    """

    assignment_S: typing.Any
    slot_TK: typing.Any
    count_E: typing.Any


class Blocks(typing.NamedTuple):
    """A plan of blocks of equal size, each of one expert.

    Attributes:
        assignment_S: the assignment in each slot; `A` if it is empty.
        slot_TK: the slot of each assignment; `S` if it has none.
        count_E: int32, how many tokens chose each expert.
        expert_N: the expert of each block.
        limit: optional int32 scalar, the most assignments that an expert
            takes; the rest is dropped.
    """

    assignment_S: typing.Any
    slot_TK: typing.Any
    count_E: typing.Any
    expert_N: typing.Any
    limit: typing.Any = None

    @property
    def placed_E(self):
        return placed(self.count_E, self.limit)


class Groups(typing.NamedTuple):
    """A plan for tokens in groups, each with its own slots at every expert.

    `C` slots for each of the `E` experts in their order, `S = E * C` of each
    group; what overflows is dropped. All tables count within a group.

    Attributes:
        assignment_GS: the assignment in each slot; `A` if it is empty.
        slot_GTK: the slot of each assignment; `S` if it has none.
        count_GE: int32, how many tokens of the group chose each expert.
        limit_G1: optional int32, the most assignments that an expert takes of
            a group.
    """

    assignment_GS: typing.Any
    slot_GTK: typing.Any
    count_GE: typing.Any
    limit_G1: typing.Any = None

    @property
    def assignment_S(self):
        return self.assignment_GS

    @property
    def slot_TK(self):
        return self.slot_GTK

    @property
    def count_E(self):
        return ops.sum(self.count_GE, axis=0)


class Capacity(typing.NamedTuple):
    """`Blocks` with one block for each expert, in their order.

    Attributes:
        assignment_S, slot_TK, count_E: those of `Blocks`.
        limit: int32 scalar, the most assignments that an expert takes; it may
            have more slots.
    """

    assignment_S: typing.Any
    slot_TK: typing.Any
    count_E: typing.Any
    limit: typing.Any


def as_index(expert):
    """Chosen experts, int32, as whole numbers that plans are made of.

    Of nearly all that is done to int32, TensorFlow's kernels for GPUs want
    operands in the memory of the host: every step of a plan would wait for the
    GPU, and the GPU for it. Those for int64 do not.
    """
    return ops.cast(expert, "int64") if xla.runs_ops_on_gpu() else expert


def cast_like(number, table):
    """An int, or a scalar of the dtype of a plan's table."""
    return number if isinstance(number, int) else ops.cast(number, table.dtype)


def plan_dropless(expert_TK, num_experts, most=None):
    """A plan in which every assignment has a slot: the one that fits.

    Outside XLA these are rows. XLA needs shapes that do not depend on the
    routing: `most` slots for each expert where that bound is known (an int),
    else blocks of half the mean load, which are at most half as many slots
    again as there are assignments, and one block an expert.
    """
    if not xla.wants_static_shapes():
        return plan_rows(expert_TK, num_experts)
    if most is not None:
        plan = plan_capacity(expert_TK, num_experts, most)
        return plan._replace(limit=ops.max(plan.count_E))
    block_size = _size(expert_TK) // (2 * num_experts) + 1
    return plan_blocks(expert_TK, num_experts, block_size)


def plan_rows(expert_TK, num_experts):
    """One slot for each assignment, expert by expert: nothing is dropped.

    The slots of masked tokens (expert id `num_experts`) come last.
    """
    order_A, row_A, count_E = _sort(expert_TK, num_experts)
    slot_TK = ops.reshape(row_A, ops.shape(expert_TK))
    return Rows(order_A, slot_TK, ops.cast(count_E, "int32"))


def plan_blocks(
    expert_TK, num_experts, block_size, most=None, limit=None, priority_TK=None
):
    """Blocks of `block_size` slots, each block of one expert.

    An expert takes as many blocks as its tokens need. The number of blocks
    is the most that can be needed, so that shapes depend on shapes alone, as
    XLA wants.

    Args:
        expert_TK: int32 or what `as_index` makes of it.
        num_experts: int, `E`.
        block_size: int.
        most: optional int, the most tokens that any expert gets, where that
            is known.
        limit, priority_TK: those of `plan_capacity`. By default nothing is
            dropped.
    """
    num_blocks = _size(expert_TK) // block_size + num_experts
    if most is not None:
        enough = num_experts * -(-most // block_size)
        if isinstance(num_blocks, int) and isinstance(enough, int):
            num_blocks = min(num_blocks, enough)
        else:
            num_blocks = ops.minimum(num_blocks, enough)
    order_A, row_A, count_E = _sort(expert_TK, num_experts, priority_TK)
    dtype = count_E.dtype
    if limit is not None:
        limit = ops.convert_to_tensor(limit, "int32")
    placed_E = placed(count_E, limit)
    blocks_E = (placed_E + block_size - 1) // block_size
    end_E = ops.cumsum(blocks_E)
    block_N = ops.arange(num_blocks, dtype=dtype)
    # Blocks past the last needed one fall to the last expert, and are empty.
    passed_N = ops.sum(
        ops.cast(block_N[:, None] >= end_E[None, : num_experts - 1], dtype),
        axis=1,
    )
    first_E = (end_E - blocks_E) * block_size
    assignment_S, slot_TK = _place(
        expert_TK, order_A, row_A, count_E, placed_E, passed_N, first_E,
        block_size,
    )  # fmt: skip
    count_E = ops.cast(count_E, "int32")
    return Blocks(assignment_S, slot_TK, count_E, passed_N, limit)


def plan_capacity(expert_TK, num_experts, slots, limit=None, priority_TK=None):
    """One block of slots an expert; what overflows is dropped.

    Args:
        expert_TK: int32 or what `as_index` makes of it.
        num_experts: int, `E`.
        slots: int or int32 scalar, slots of each expert.
        limit: optional int32 scalar, how many of them an expert may use.
            Defaults to all.
        priority_TK: optional float; the assignments of the highest priority
            are kept. By default those of the earliest tokens are.
    """
    order_A, row_A, count_E = _sort(expert_TK, num_experts, priority_TK)
    expert_N = ops.arange(num_experts, dtype=count_E.dtype)
    limit = ops.convert_to_tensor(slots if limit is None else limit, "int32")
    slots = cast_like(slots, expert_N)
    placed_E = placed(count_E, limit)
    assignment_S, slot_TK = _place(
        expert_TK, order_A, row_A, count_E, placed_E, expert_N,
        expert_N * slots, slots,
    )  # fmt: skip
    return Capacity(assignment_S, slot_TK, ops.cast(count_E, "int32"), limit)


def placed(count_E, limit):
    """How many of an expert's assignments have a slot, `(E,)`."""
    return count_E if limit is None else ops.minimum(count_E, limit)


def dropped(plan):
    """How many assignments found their expert full, int32 `(E,)`."""
    if isinstance(plan, Groups):
        full_GE = plan.count_GE - placed(plan.count_GE, plan.limit_G1)
        return ops.sum(full_GE, axis=0)
    return plan.count_E - placed(plan.count_E, _limit(plan))


def effective_capacity(plan):
    """Slots of an expert over the mean number of assignments, float32.

    What a capacity factor comes to after rounding up. Where nothing limits an
    expert, it is that of the busiest. 0 if nothing is routed.
    """
    num_experts = plan.count_E.shape[0]
    if isinstance(plan, Groups):
        limit = None if plan.limit_G1 is None else ops.sum(plan.limit_G1)
    else:
        limit = _limit(plan)
    if limit is None:
        limit = ops.max(plan.count_E)
    total = ops.cast(ops.sum(plan.count_E), "float32")
    return ops.cast(limit, "float32") * num_experts / ops.maximum(total, 1.0)


def _limit(plan):
    return None if isinstance(plan, Rows) else plan.limit


def _sort(expert_TK, num_experts, priority_TK=None):
    """Order of the assignments by expert, its inverse, and counts.

    Those of one expert are in the order of their tokens, or of their priority,
    the highest first.
    """
    expert_A = ops.reshape(expert_TK, (-1,))
    dtype = expert_A.dtype
    if priority_TK is None:
        order_A = tf.argsort(expert_A, stable=True)
    else:
        first_A = tf.argsort(-ops.reshape(priority_TK, (-1,)), stable=True)
        order_A = tf.gather(
            first_A, tf.argsort(tf.gather(expert_A, first_A), stable=True)
        )
    order_A = ops.cast(order_A, dtype)
    num_assignments = _size(expert_TK)
    row_A = tf.scatter_nd(
        order_A[:, None],
        ops.arange(num_assignments, dtype=dtype),
        ops.cast([num_assignments], dtype),
    )
    # Of int32, for which GPUs have these sums; of int64 they have not.
    count_E = ops.segment_sum(
        ops.ones_like(expert_A, dtype="int32"),
        expert_A,
        num_segments=num_experts + 1,
    )[:num_experts]
    count_E = ops.cast(count_E, dtype)
    return order_A, row_A, count_E


def _place(
    expert_TK,
    order_A,
    row_A,
    count_E,
    placed_E,
    expert_N,
    first_E,
    block_size,
):
    """Lays sorted assignments into blocks of slots.

    The assignments of expert `e` begin at row `offset_E[e]` of the order and
    at slot `first_E[e]`; those past `placed_E[e]` get no slot.
    """
    num_experts = count_E.shape[0]
    num_assignments = _size(expert_TK)
    num_slots = _size(expert_N) * block_size
    offset_E = ops.cumsum(count_E) - count_E

    slot_S = ops.arange(num_slots, dtype=count_E.dtype)
    expert_S = tf.gather(expert_N, slot_S // block_size)
    position_S = slot_S - tf.gather(first_E, expert_S)
    row_S = tf.gather(offset_E, expert_S) + position_S
    full_S = position_S < tf.gather(placed_E, expert_S)
    row_S = ops.where(full_S, row_S, 0)
    assignment_S = ops.where(full_S, tf.gather(order_A, row_S), num_assignments)

    expert_A = ops.reshape(expert_TK, (-1,))
    known_A = ops.minimum(expert_A, num_experts - 1)
    position_A = row_A - tf.gather(offset_E, known_A)
    placed_A = ops.logical_and(
        expert_A < num_experts, position_A < tf.gather(placed_E, known_A)
    )
    slot_A = ops.where(
        placed_A, tf.gather(first_E, known_A) + position_A, num_slots
    )
    slot_TK = ops.reshape(slot_A, ops.shape(expert_TK))
    return assignment_S, slot_TK


def _size(x):
    """Number of entries: an int where the shape is known, else a tensor."""
    return math.prod(ops.shape(x))
