"""The plans: which slots there are, and which assignment gets which.

| plan | slots | shapes depend on |
| --- | --- | --- |
| `Rows` | one for each assignment, expert by expert | the routing |
| `Blocks` | blocks of equal size, as many as each expert needs | shapes |
| `Capacity` | one block an expert | the capacity |
| `Groups` | one block an expert and token group | the capacity |

`moe_tf.dispatch.choice` chooses among them.
"""

import dataclasses
from collections.abc import Callable
from collections.abc import Sequence

import tensorflow as tf
from keras import ops

from moe_tf import xla
from moe_tf.dispatch import all_to_all
from moe_tf.dispatch import grouped
from moe_tf.dispatch.plan import Plan
from moe_tf.dispatch.plan import cast_like
from moe_tf.dispatch.plan import size
from moe_tf.dispatch.plan import take_or_zero
from moe_tf.dispatch.sorting import place
from moe_tf.dispatch.sorting import sort_by_expert
from moe_tf.types import Tensor

_Function = Callable[..., Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class Rows(Plan):
    """A plan in which every assignment has a slot and no slot is empty.

    Slots lie expert by expert, `count_E` of each, those of masked tokens
    last.
    """

    def apply(
        self, function: _Function, x_SD: Tensor, kernels: Sequence[Tensor]
    ) -> Tensor:
        return grouped.apply_to_rows(function, x_SD, kernels, self.count_E)

    def take(self, x: Tensor, index: Tensor) -> Tensor:
        return tf.gather(x, index)  # No slot is empty, so no index is past.


@dataclasses.dataclass(frozen=True, eq=False)
class Capacity(Plan):
    """A plan with one block of slots for each expert, in their order.

    Attributes:
        limit: optional int32 scalar, the most assignments that an expert
            takes; the rest is dropped. An expert may have more slots.
    """

    limit: Tensor | None = None

    @property
    def placed_E(self) -> Tensor:
        """How many assignments of each expert have a slot, `(E,)`."""
        return _placed(self.count_E, self.limit)

    def apply(
        self, function: _Function, x_SD: Tensor, kernels: Sequence[Tensor]
    ) -> Tensor:
        return grouped.apply_to_blocks(function, x_SD, kernels)

    def dropped_E(self) -> Tensor:
        return self.count_E - self.placed_E

    def _total_limit(self):
        return self.limit


@dataclasses.dataclass(frozen=True, eq=False)
class Blocks(Capacity):
    """A plan of blocks of equal size, as many of each expert as it needs.

    Attributes:
        expert_N: index, the expert of each block.
        block_size: int or scalar, slots in a block.
    """

    expert_N: Tensor = None
    block_size: int | Tensor = None

    def apply(
        self, function: _Function, x_SD: Tensor, kernels: Sequence[Tensor]
    ) -> Tensor:
        kernels = [tf.gather(kernel, self.expert_N) for kernel in kernels]
        return grouped.apply_to_blocks(function, x_SD, kernels)


@dataclasses.dataclass(frozen=True, eq=False)
class Groups(Plan):
    """A plan for tokens in groups, each with its own slots at every expert.

    `C` slots for each of the `E` experts in their order, `S = E * C` of each
    group. What overflows is dropped. All tables count within a group.

    Attributes:
        assignment_S: `(G, S)`.
        slot_TK: `(G, T, K)`.
        count_GE: int32, how many tokens of each group chose each expert.
        limit_G1: optional int32, the most assignments that an expert takes of
            each group.
    """

    count_GE: Tensor = None
    limit_G1: Tensor | None = None

    def apply(
        self, function: _Function, x_SD: Tensor, kernels: Sequence[Tensor]
    ) -> Tensor:
        return all_to_all.apply_at_experts(function, x_SD, kernels)

    def dropped_E(self) -> Tensor:
        placed_GE = _placed(self.count_GE, self.limit_G1)
        return ops.sum(self.count_GE - placed_GE, axis=0)

    def take(self, x: Tensor, index: Tensor) -> Tensor:
        return take_or_zero(x, index, batch_dims=1)

    def _total_limit(self):
        return None if self.limit_G1 is None else ops.sum(self.limit_G1)

    def _num_used_choices(self):
        return self.slot_TK.shape[-1]


def plan_rows(expert_TK: Tensor, num_experts: int) -> Rows:
    """Plans one slot for each assignment, expert by expert.

    Nothing is dropped. The slots of masked tokens (expert id `num_experts`)
    come last.
    """
    assignments = sort_by_expert(expert_TK, num_experts)
    return Rows(
        assignments.order_A,
        ops.reshape(assignments.row_A, ops.shape(expert_TK)),
        ops.cast(assignments.count_E, "int32"),
    )


def plan_blocks(
    expert_TK: Tensor,
    num_experts: int,
    block_size: int | Tensor,
    max_tokens: int | Tensor | None = None,
    limit: int | Tensor | None = None,
    priority_TK: Tensor | None = None,
) -> Blocks:
    """Plans blocks of `block_size` slots, each block of one expert.

    An expert takes as many blocks as its tokens need. The number of blocks
    is the most that can be needed, so that shapes depend on shapes alone, as
    XLA wants.

    Args:
        expert_TK: index, see `sorting.sort_by_expert`.
        num_experts: int, `E`.
        block_size: int.
        max_tokens: optional int, the most tokens that any expert gets, where
            the router knows a bound.
        limit: optional int32 scalar, the most assignments that an expert
            takes. By default nothing is dropped.
        priority_TK: optional float; see `plan_capacity`.
    """
    num_blocks = size(expert_TK) // block_size + num_experts
    if max_tokens is not None:
        enough = num_experts * -(-max_tokens // block_size)
        if isinstance(num_blocks, int) and isinstance(enough, int):
            num_blocks = min(num_blocks, enough)
        else:
            num_blocks = ops.minimum(num_blocks, enough)
    assignments = sort_by_expert(expert_TK, num_experts, priority_TK)
    count_E, offset_E = assignments.count_E, assignments.offset_E
    if limit is not None:
        limit = ops.convert_to_tensor(limit, "int32")
    placed_E = _placed(count_E, limit)
    blocks_E = (placed_E + block_size - 1) // block_size
    last_E = ops.cumsum(blocks_E)
    first_E = last_E - blocks_E
    block_N = ops.arange(num_blocks, dtype=count_E.dtype)
    # Blocks past the last needed one fall to the last expert, and are empty.
    expert_N = ops.sum(
        ops.cast(
            block_N[:, None] >= last_E[None, : num_experts - 1], count_E.dtype
        ),
        axis=1,
    )
    block_within_N = block_N - tf.gather(first_E, expert_N)
    assignment_S, slot_A = place(
        assignments,
        placed_E,
        first_slot_E=first_E * block_size,
        begin_N=tf.gather(offset_E, expert_N) + block_within_N * block_size,
        end_N=tf.gather(offset_E + placed_E, expert_N),
        block_size=block_size,
    )
    return Blocks(
        assignment_S,
        ops.reshape(slot_A, ops.shape(expert_TK)),
        ops.cast(count_E, "int32"),
        limit,
        expert_N,
        block_size,
    )


def plan_capacity(
    expert_TK: Tensor,
    num_experts: int,
    slots: int | Tensor,
    limit: int | Tensor | None = None,
    priority_TK: Tensor | None = None,
) -> Capacity:
    """Plans one block of slots an expert; what overflows is dropped.

    Args:
        expert_TK: index, see `sorting.sort_by_expert`.
        num_experts: int, `E`.
        slots: int or int32 scalar, `C`, slots of each expert.
        limit: optional int32 scalar, how many of the slots an expert may use.
            Defaults to all.
        priority_TK: optional float; the assignments of the highest priority
            are kept. By default those of the earliest tokens are.
    """
    limit = ops.convert_to_tensor(slots if limit is None else limit, "int32")
    assignments = sort_by_expert(expert_TK, num_experts, priority_TK)
    assignment_S, slot_TK = _place_by_capacity(
        assignments, expert_TK, slots, limit
    )
    count_E = ops.cast(assignments.count_E, "int32")
    return Capacity(assignment_S, slot_TK, count_E, limit)


def plan_groups(
    expert_GTK: Tensor,
    num_experts: int,
    slots: int | Tensor,
    limit_G: Tensor | None = None,
    priority_GTK: Tensor | None = None,
) -> Groups:
    """Plans `slots` slots for each token group at every expert.

    Args:
        expert_GTK: index, see `sorting.sort_by_expert`.
        num_experts: int, `E`.
        slots: int, `C`.
        limit_G: optional int32, how many of the slots an expert may use for
            each group. Defaults to all.
        priority_GTK: optional float; see `plan_capacity`.
    """
    limit_G1 = None if limit_G is None else limit_G[:, None]
    assignments = sort_by_expert(expert_GTK, num_experts, priority_GTK)
    assignment_GS, slot_GTK = _place_by_capacity(
        assignments, expert_GTK, slots, limit_G1
    )
    count_GE = ops.cast(assignments.count_E, "int32")
    count_E = ops.sum(count_GE, axis=0)
    return Groups(assignment_GS, slot_GTK, count_E, count_GE, limit_G1)


def plan_dropless(
    expert_TK: Tensor, num_experts: int, max_tokens: int | None = None
) -> Plan:
    """Plans a slot for every assignment, in the way that suits the trace.

    Outside XLA the plan is `Rows`. XLA needs shapes that do not depend on
    the routing: `max_tokens` slots for each expert where that bound is known
    (an int), else blocks of half the mean load. There are at most half as
    many slots again as assignments, and one block an expert.
    """
    if not xla.wants_static_shapes():
        return plan_rows(expert_TK, num_experts)
    if max_tokens is not None:
        plan = plan_capacity(expert_TK, num_experts, max_tokens)
        return dataclasses.replace(plan, limit=ops.max(plan.count_E))
    block_size = size(expert_TK) // (2 * num_experts) + 1
    return plan_blocks(expert_TK, num_experts, block_size)


def _place_by_capacity(assignments, expert_TK, slots, limit):
    """Places assignments in one block of `slots` slots an expert."""
    count_E, offset_E = assignments.count_E, assignments.offset_E
    slots_or_scalar = cast_like(slots, count_E)
    placed_E = ops.cast(_placed(count_E, limit), count_E.dtype)
    placed_E = ops.minimum(placed_E, slots_or_scalar)
    expert_E = ops.arange(count_E.shape[-1], dtype=count_E.dtype)
    assignment_S, slot_A = place(
        assignments,
        placed_E,
        first_slot_E=expert_E * slots_or_scalar,
        begin_N=offset_E,
        end_N=offset_E + placed_E,
        block_size=slots,
    )
    return assignment_S, ops.reshape(slot_A, ops.shape(expert_TK))


def _placed(count_E, limit):
    return count_E if limit is None else ops.minimum(count_E, limit)
