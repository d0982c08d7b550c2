"""What a mesh asks of groups: of a layer's tokens, and of its experts."""

import warnings

from moe_tf import sharding


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


def spread(branching, axes):
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


def warn_of_spread_experts(layer, branching, axes):
    """Warns where the experts of a group lie on several devices.

    Args:
        layer: str, its name.
        branching, axes: as for `spread`.
    """
    told = spread(branching, axes)
    if told is not None:
        warnings.warn(
            f"Groups of experts of the layer {layer} are {told}", stacklevel=2
        )
