"""What routers of two levels have in common, appendix B."""

import warnings

import tensorflow as tf

from moe_tf import checks
from moe_tf import sharding
from moe_tf.dispatch import grouped
from moe_tf.dispatch import plans
from moe_tf.dispatch import sorting
from moe_tf.routing import router


class TwoLevelRouter(router.Router):
    """Chooses among `P` groups, and in each among its `Q` experts.

    Expert `j` of group `i` is expert `i * Q + j`.

    Args:
        branching: pair of ints `(P, Q)`.
        k: int, kept at each level, at most `P` and at most `Q`.
        **kwargs: those of `Router` but for `z_loss_weight`.
    """

    def __init__(self, branching, k, **kwargs):
        if "z_loss_weight" in kwargs:
            raise ValueError(
                "`z_loss_weight` is for routers of one level; leave it out. "
                f"Received: z_loss_weight={kwargs['z_loss_weight']}"
            )
        groups, group_size = check_branching(branching)
        super().__init__(groups * group_size, k, **kwargs)
        if k > min(groups, group_size):
            raise ValueError(
                "`k` must be at most the number of groups and of experts in "
                f"a group. Received: k={k}, branching={branching}"
            )
        self.branching = groups, group_size
        self.experts_per_token = k * k

    def get_config(self):
        config = super().get_config()
        for name in ("num_experts", "z_loss_weight"):
            del config[name]
        return {**config, "branching": self.branching}


def of_chosen(x_TD, group_TK, kernel_PDQ, most=None):
    """Products of each token with the kernels of its groups alone.

    Args:
        x_TD: float.
        group_TK: int32, the groups of each token; `P` for none.
        kernel_PDQ: float.
        most: optional int, the most tokens of any group.

    Returns:
        `(y_SQ, plan)`: the products group by group, and the plan of `plans`
        that says which slot is which token's.
    """
    group_TK = sorting.as_index(group_TK)
    plan = plans.plan_dropless(group_TK, kernel_PDQ.shape[0], most)
    x_SD = plan.dispatch(x_TD)
    y_SQ = plan.apply(grouped.matmul, x_SD, [kernel_PDQ])
    return y_SQ, plan


def of_all(x_TD, kernel_PDQ):
    """Products of each token with the kernels of all groups: `(T, P, Q)`."""
    return tf.einsum("TD,PDQ->TPQ", x_TD, kernel_PDQ)


def check_branching(branching):
    """The two numbers of `branching`, checked."""
    try:
        groups, group_size = branching
    except (TypeError, ValueError):
        raise ValueError(
            "`branching` must be a pair, groups and experts in each group. "
            f"Received: branching={branching}"
        ) from None
    checks.at_least("branching[0]", groups, 1)
    checks.at_least("branching[1]", group_size, 1)
    return groups, group_size


def describe_spread_branches(branching, axes):
    """Says that the experts of a group lie on several devices.

    In appendix B of the paper each group has a device, so that what the
    secondary gate chooses is computed where the token has been sent.

    Args:
        branching: pair of ints, groups and experts in each.
        axes: dict from axis to size.

    Returns:
        The end of a sentence about them; None where each lies on one.
    """
    axis = sharding.expert_axis(axes)
    if branching[0] % axes[axis] == 0:
        return None
    nearest = sharding.nearest_sizes(branching[0], axes[axis])
    return (
        f"spread over devices; each lies on one where the axis `{axis}` "
        f"divides branching[0], {axis}={nearest} say. "
        f"Received: branching={branching}, axes={axes}"
    )


def warn_of_spread_branches(layer, branching, axes):
    """Warns where the experts of a group lie on several devices.

    Args:
        layer: str, its name.
        branching, axes: as for `describe_spread_branches`.
    """
    told = describe_spread_branches(branching, axes)
    if told is not None:
        warnings.warn(
            f"Groups of experts of the layer {layer} are {told}", stacklevel=2
        )
