"""The choice of a plan for a batch."""

import typing

from keras import ops

from moe_tf import xla
from moe_tf.dispatch import plans
from moe_tf.dispatch.capacity import expert_capacity
from moe_tf.dispatch.plan import Plan
from moe_tf.types import Tensor

DROP_POLICIES = ("position", "gate_value")


class Limit(typing.NamedTuple):
    """The limit that a capacity factor sets to the tokens of an expert.

    Attributes:
        capacity_factor: float.
        experts_per_token: int, assignments that a token makes.
        drop_policy: one of `DROP_POLICIES`.
    """

    capacity_factor: float
    experts_per_token: int
    drop_policy: str

    def slots(self, num_tokens: int | Tensor, num_experts: int) -> int | Tensor:
        """Returns the capacity of an expert for a number of tokens."""
        return expert_capacity(
            num_tokens * self.experts_per_token,
            num_experts,
            self.capacity_factor,
        )


def choose_plan(
    weight_TK: Tensor,
    expert_TK: Tensor,
    mask_T: Tensor | None,
    num_experts: int,
    *,
    limit: Limit | None = None,
    max_tokens: int | Tensor | None = None,
    block_size: int | None = None,
) -> Plan:
    """Chooses and makes the plan of a batch.

    | tokens | limit | plan |
    | --- | --- | --- |
    | in groups `(G, T)` | any | `Groups`; without a limit with a slot for each token that an expert may get |
    | for the GPU kernels (`block_size`) | any | `Blocks` of that size |
    | else | none | `plan_dropless`: `Rows`, in XLA `Blocks` or `Capacity` |
    | else | some | `Capacity` |

    The limit counts unmasked tokens, the slots all tokens: padding changes
    no drop, and shapes depend on shapes alone.

    Args:
        weight_TK: float `(T, K)` or `(G, T, K)`, gate values.
        expert_TK: int32, the chosen experts; `num_experts` for none.
        mask_T: optional bool, which tokens count.
        num_experts: int, `E`.
        limit: optional `Limit`. Defaults to none: nothing is dropped.
        max_tokens: optional int, the most tokens that any expert gets of a
            group, where the router knows a bound.
        block_size: optional int, slots in a block of the kernels that will
            run the experts.
    """  # noqa: E501
    expert_TK = xla.as_index(expert_TK)
    num_tokens = ops.shape(expert_TK)[-2]
    slots = max_placed = priority_TK = None
    if limit is not None:
        slots = max_placed = limit.slots(num_tokens, num_experts)
        if mask_T is not None:
            num_real = ops.sum(ops.cast(mask_T, "int64"), axis=-1)
            max_placed = limit.slots(num_real, num_experts)
        if limit.drop_policy == "gate_value":
            priority_TK = weight_TK
    if len(expert_TK.shape) == 3:
        if slots is None:
            slots = num_tokens if max_tokens is None else max_tokens
        if isinstance(max_placed, int):
            num_groups = ops.shape(expert_TK)[0]
            max_placed = ops.full((num_groups,), max_placed, "int32")
        return plans.plan_groups(
            expert_TK, num_experts, slots, max_placed, priority_TK
        )
    if block_size is not None:
        return plans.plan_blocks(
            expert_TK,
            num_experts,
            block_size,
            max_tokens,
            max_placed,
            priority_TK,
        )
    if limit is None:
        return plans.plan_dropless(expert_TK, num_experts, max_tokens)
    return plans.plan_capacity(
        expert_TK, num_experts, slots, max_placed, priority_TK
    )
