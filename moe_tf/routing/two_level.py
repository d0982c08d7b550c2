"""Base class of the routers of two levels, appendix B."""

import warnings

import tensorflow as tf

from moe_tf import checks
from moe_tf import sharding
from moe_tf import xla
from moe_tf.dispatch import grouped
from moe_tf.dispatch import plans
from moe_tf.dispatch.plan import Plan
from moe_tf.routing import router
from moe_tf.types import Tensor


class TwoLevelRouter(router.Router):
    """Chooses among `P` branches, and in each branch among its `Q` experts.

    Expert `j` of branch `i` is expert `i * Q + j`.

    Args:
        branching: pair of ints `(P, Q)`.
        k: int, choices at each level, at most `P` and at most `Q`.
        **kwargs: those of `Router` except `z_loss_weight`.
    """

    def __init__(self, branching: tuple[int, int], k: int, **kwargs):
        if "z_loss_weight" in kwargs:
            raise ValueError(
                "`z_loss_weight` is for routers of one level; leave it out. "
                f"Received: z_loss_weight={kwargs['z_loss_weight']}"
            )
        num_branches, branch_size = check_branching(branching)
        super().__init__(num_branches * branch_size, k, **kwargs)
        if k > min(num_branches, branch_size):
            raise ValueError(
                "`k` must be at most the number of branches and of experts in "
                f"a branch. Received: k={k}, branching={branching}"
            )
        self.branching = num_branches, branch_size
        self.experts_per_token = k * k

    @classmethod
    def weight_shapes(
        cls, width: int, branching: tuple[int, int]
    ) -> list[tuple[int, ...]]:
        num_branches, branch_size = branching
        return [(width, num_branches), (num_branches, width, branch_size)]

    @classmethod
    def operations_per_token(
        cls, width: int, branching: tuple[int, int], k: int
    ) -> int:
        num_branches, branch_size = branching
        return width * (num_branches + k * branch_size)

    def get_config(self):
        config = super().get_config()
        for name in ("num_experts", "z_loss_weight"):
            del config[name]
        return {**config, "branching": self.branching}


def matmul_of_chosen_branches(
    x_TD: Tensor,
    branch_TK: Tensor,
    kernel_PDQ: Tensor,
    max_tokens: int | Tensor | None = None,
) -> tuple[Tensor, Plan]:
    """Multiplies each token with the kernels of its branches alone.

    Args:
        x_TD: float.
        branch_TK: int32, the branches of each token; `P` for none.
        kernel_PDQ: float.
        max_tokens: optional int, the largest number of tokens of a branch.

    Returns:
        `(y_SQ, plan)`: the products by slot, and the plan that assigns the
        tokens to the slots, in which branches take the place of experts.
    """
    branch_TK = xla.as_index(branch_TK)
    plan = plans.plan_dropless(branch_TK, kernel_PDQ.shape[0], max_tokens)
    x_SD = plan.dispatch(x_TD)
    y_SQ = plan.apply(grouped.matmul, x_SD, [kernel_PDQ])
    return y_SQ, plan


def matmul_of_all_branches(x_TD: Tensor, kernel_PDQ: Tensor) -> Tensor:
    """Multiplies each token with the kernels of all branches: `(T, P, Q)`."""
    return tf.einsum("TD,PDQ->TPQ", x_TD, kernel_PDQ)


def check_branching(branching: tuple[int, int]) -> tuple[int, int]:
    """Returns `branching`, or raises `ValueError` if it is no pair of sizes."""
    try:
        num_branches, branch_size = branching
    except (TypeError, ValueError):
        raise ValueError(
            "`branching` must be a pair, branches and experts in each branch. "
            f"Received: branching={branching}"
        ) from None
    checks.at_least("branching[0]", num_branches, 1)
    checks.at_least("branching[1]", branch_size, 1)
    return num_branches, branch_size


def describe_split_branches(
    branching: tuple[int, int], axes: dict[str, int]
) -> str | None:
    """Returns a message if the experts of a branch are on several devices.

    In appendix B of the paper each branch has a device of its own, so a token
    is sent to the devices of its branches only. The results are the same
    either way.

    Args:
        branching: pair of ints, branches and experts in each branch.
        axes: dict from axis to size.

    Returns:
        A predicate, whose subject is the branches; `None` where each branch
        is on one device.
    """
    axis = sharding.expert_axis(axes)
    if branching[0] % axes[axis] == 0:
        return None
    nearest = sharding.nearest_sizes(branching[0], axes[axis])
    return (
        f"spread over devices; each is on one device if the axis `{axis}` "
        f"divides branching[0], such as {axis}={nearest}. "
        f"Received: branching={branching}, axes={axes}"
    )


def warn_of_split_branches(
    layer: str, branching: tuple[int, int], axes: dict[str, int]
) -> None:
    """Warns if the experts of a branch are on several devices.

    Args:
        layer: str, the layer's name.
        branching, axes: see `describe_split_branches`.
    """
    message = describe_split_branches(branching, axes)
    if message is not None:
        warnings.warn(
            f"Branches of experts of the layer {layer} are {message}",
            stacklevel=2,
        )
