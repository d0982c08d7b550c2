"""Tokens in groups, and their plan: what experts on a mesh of devices need.

Which tokens are dropped depends on the groups and on nothing else, so that the
number of devices changes no result. All tables are made group by group, with
sorts and gathers that devices do on their own groups.
"""

import tensorflow as tf
from keras import ops

from moe_tf import sharding
from moe_tf.dispatch import plans


def plan(expert_GTK, num_experts, slots, limit_G=None, priority_GTK=None):
    """`plans.Groups` with `slots` slots of each group at every expert.

    Args:
        expert_GTK: int32 or what `plans.as_index` makes of it, the experts that
            the `T` tokens of each group chose; `num_experts` for none.
        num_experts: int, `E`.
        slots: int, `C`.
        limit_G: optional int32, how many of them an expert may use of each
            group. Defaults to all.
        priority_GTK: optional float; the assignments of the highest priority
            are kept. By default those of the earliest tokens are.
    """
    num_groups, num_tokens, k = ops.shape(expert_GTK)
    flat = num_groups, num_tokens * k
    expert_GA = ops.reshape(expert_GTK, flat)
    if priority_GTK is None:
        order_GA = tf.argsort(expert_GA, stable=True)
    else:
        first_GA = tf.argsort(-ops.reshape(priority_GTK, flat), stable=True)
        order_GA = _pick(
            first_GA, tf.argsort(_pick(expert_GA, first_GA), stable=True)
        )
    dtype = expert_GA.dtype
    order_GA = ops.cast(order_GA, dtype)
    row_GA = ops.cast(tf.argsort(order_GA, stable=True), dtype)  # the inverse
    num_assignments, slots = (
        plans.cast_like(number, order_GA) for number in (num_tokens * k, slots)
    )
    count_GE = _count(expert_GTK, num_experts)
    limit_G1 = None if limit_G is None else limit_G[:, None]
    placed_GE = ops.cast(plans.placed(count_GE, limit_G1), dtype)
    placed_GE = ops.minimum(placed_GE, slots)
    offset_GE = ops.cast(ops.cumsum(count_GE, axis=-1) - count_GE, dtype)

    position_C = ops.arange(slots, dtype=dtype)
    row_GS = _flat(offset_GE[..., None] + position_C)
    full_GS = _flat(position_C < placed_GE[..., None])
    assignment_GS = _pick(order_GA, ops.where(full_GS, row_GS, 0))
    assignment_GS = ops.where(full_GS, assignment_GS, num_assignments)

    known_GA = ops.minimum(expert_GA, num_experts - 1)
    position_GA = row_GA - _pick(offset_GE, known_GA)
    placed_GA = ops.logical_and(
        expert_GA < num_experts, position_GA < _pick(placed_GE, known_GA)
    )
    slot_GA = ops.where(
        placed_GA, known_GA * slots + position_GA, num_experts * slots
    )
    return plans.Groups(
        assignment_GS,
        ops.reshape(slot_GA, (num_groups, num_tokens, k)),
        count_GE,
        limit_G1,
    )


def pad(x_TD, mask_T, num_groups):
    """Tokens and mask with masked tokens appended until groups are alike.

    On a mesh every device then has all tokens for a moment.
    """
    number = ops.shape(x_TD)[0]
    missing = -number % num_groups
    if isinstance(missing, int) and missing == 0:
        return x_TD, mask_T
    if mask_T is None:
        mask_T = ops.ones((number,), "bool")
    x_TD = _append(x_TD, missing)
    return x_TD, ops.cast(_append(ops.cast(mask_T, "int32"), missing), "bool")


def _append(x, missing):
    """`x` with rows of zeros, whole on every device before and after."""
    spec = [None] * len(x.shape)
    x = sharding.constrain(x, *spec)
    x = tf.pad(x, [[0, missing], *[[0, 0]] * (len(spec) - 1)])
    return sharding.constrain(x, *spec)


def split(x, num_groups):
    """`(T, ...)` as `(G, T / G, ...)`, by order; `None` stays."""
    if x is None:
        return None
    rest = ops.shape(x)[1:]
    return sharding.constrain(
        ops.reshape(x, (num_groups, -1, *rest)),
        "batch",
        *[None] * (len(rest) + 1),
    )


def _pick(x_GN, index_GM):
    return tf.gather(x_GN, index_GM, batch_dims=1)


def _flat(x_GEC):
    num_groups, num_experts, slots = ops.shape(x_GEC)
    return ops.reshape(x_GEC, (num_groups, num_experts * slots))


def _count(expert_GTK, num_experts):
    """How often each expert is chosen in each group, column by column."""

    def column(j):
        # Floats, exact to 2^24, since GPUs leave sums of int32 to the host.
        chosen_GTE = ops.one_hot(
            expert_GTK[..., j], num_experts, dtype="float32"
        )
        return ops.cast(ops.sum(chosen_GTE, axis=1), "int32")

    return sum(column(j) for j in range(expert_GTK.shape[-1]))


def num_groups(layer, asked, axes, decide):
    """How many groups of tokens a layer has on a mesh.

    Args:
        layer: str, its name.
        asked: int, or None for one a device along `batch`.
        axes: dict from axis to size.
        decide: whether groups decide which tokens an expert gets.

    Raises:
        ValueError: it would depend on the mesh what is computed, or the axis
            does not divide the number.
    """
    size = axes["batch"]
    if asked is None and size > 1 and decide:
        raise ValueError(
            f"On a mesh the layer {layer} needs `num_groups`: groups of tokens "
            "decide which are dropped, and the number of devices must not. "
            f"Give a multiple of the axis batch: num_groups={size}, say. "
            f"Received: num_groups=None, axes={axes}"
        )
    chosen = asked or size
    if chosen % size:
        raise ValueError(
            f"`num_groups` of the layer {layer} must be a multiple of the "
            f"mesh's axis batch. Received: num_groups={chosen}, axes={axes}"
        )
    return chosen
