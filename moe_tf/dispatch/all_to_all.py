"""The all-to-alls: slots to the devices of their experts, answers back."""

from collections.abc import Callable
from collections.abc import Sequence

from keras import ops

from moe_tf import sharding
from moe_tf.types import Tensor


def apply_at_experts(
    function: Callable[..., Tensor], x_GSD: Tensor, kernels: Sequence[Tensor]
) -> Tensor:
    """Calls `function` once, over the slots of all token groups.

    On a mesh the slots are sharded by token group before and after, and by
    expert in between. If groups and experts share a mesh axis, each change
    is an all-to-all.

    Args:
        function: see `Plan.apply`.
        x_GSD: float, the slots of each group expert by expert.
        kernels: float tensors `(E, I, O)`.

    Returns:
        Float `(G, S, O)`.
    """
    num_experts = kernels[0].shape[0]
    num_groups, num_slots, width = ops.shape(x_GSD)
    slots = num_slots // num_experts
    x_GECD = ops.reshape(x_GSD, (num_groups, num_experts, slots, width))
    x_EGCD = ops.transpose(_shard_by_expert(x_GECD), (1, 0, 2, 3))
    x_ECD = ops.reshape(x_EGCD, (num_experts, num_groups * slots, width))
    y_ECO = function(x_ECD, *kernels)
    shape = num_experts, num_groups, slots, y_ECO.shape[-1]
    y_GECO = ops.transpose(ops.reshape(y_ECO, shape), (1, 0, 2, 3))
    y_GECO = sharding.constrain(y_GECO, "batch", None, None, None)
    return ops.reshape(y_GECO, (num_groups, num_slots, shape[-1]))


def _shard_by_expert(x_GECD):
    axes = sharding.axes()
    if axes is None:
        return x_GECD
    axis = sharding.expert_axis(axes)
    group_axis = None if axis == "batch" else "batch"
    return sharding.constrain(x_GECD, group_axis, axis, None, None)
