"""Slots sent to the devices of their experts, and answers sent back."""

from keras import ops

from moe_tf import sharding


def by_groups(function, x_GSD, kernels):
    """One batched call over the slots of all groups at each expert.

    On a mesh slots lie with their groups before and after, and with their
    experts in between: two all-to-alls, if both share an axis.
    """
    num_experts = kernels[0].shape[0]
    num_groups, num_slots, width = ops.shape(x_GSD)
    slots = num_slots // num_experts
    x_GECD = ops.reshape(x_GSD, (num_groups, num_experts, slots, width))
    x_EGCD = ops.transpose(_to_experts(x_GECD), (1, 0, 2, 3))
    x_ECD = ops.reshape(x_EGCD, (num_experts, num_groups * slots, width))
    y_ECO = function(x_ECD, *kernels)
    shape = num_experts, num_groups, slots, y_ECO.shape[-1]
    y_GECO = ops.transpose(ops.reshape(y_ECO, shape), (1, 0, 2, 3))
    y_GECO = sharding.constrain(y_GECO, "batch", None, None, None)
    return ops.reshape(y_GECO, (num_groups, num_slots, shape[-1]))


def _to_experts(x_GECD):
    axes = sharding.axes()
    if axes is None:
        return x_GECD
    axis = sharding.expert_axis(axes)
    group_axis = None if axis == "batch" else "batch"
    return sharding.constrain(x_GECD, group_axis, axis, None, None)
