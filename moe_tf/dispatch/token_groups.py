"""Token groups, as in GShard: parts of a batch that are routed apart.

Which tokens are dropped depends on the groups and on nothing else, so that the
number of devices changes no result. On a mesh each device has whole groups.
"""

import tensorflow as tf
from keras import ops

from moe_tf import sharding
from moe_tf.types import Tensor


def check_num_groups(
    layer: str, num_groups: int | None, axes: dict[str, int], required: bool
) -> int:
    """Returns the number of token groups of a layer on a mesh.

    Args:
        layer: name of the layer, for errors.
        num_groups: optional int, as the user set it. Defaults to one group a
            device along `batch`.
        axes: sizes of the mesh's axes by name.
        required: whether the groups decide which tokens an expert gets.

    Raises:
        ValueError: `num_groups` is required and is not set, or the axis
            `batch` does not divide it.
    """
    size = axes["batch"]
    if num_groups is None and size > 1 and required:
        raise ValueError(
            f"On a mesh the layer {layer} needs `num_groups`: groups of tokens "
            "decide which are dropped, and the number of devices must not. "
            f"Give a multiple of the axis batch: num_groups={size}, say. "
            f"Received: num_groups=None, axes={axes}"
        )
    num_groups = num_groups or size
    if num_groups % size:
        raise ValueError(
            f"`num_groups` of the layer {layer} must be a multiple of the "
            "mesh's axis batch. "
            f"Received: num_groups={num_groups}, axes={axes}"
        )
    return num_groups


def pad_tokens(
    x_TD: Tensor, mask_T: Tensor | None, num_groups: int
) -> tuple[Tensor, Tensor | None]:
    """Appends masked tokens until all groups have equally many.

    On a mesh every device then has all tokens for a moment.
    """
    num_tokens = ops.shape(x_TD)[0]
    missing = -num_tokens % num_groups
    if isinstance(missing, int) and missing == 0:
        return x_TD, mask_T
    if mask_T is None:
        mask_T = ops.ones((num_tokens,), "bool")
    x_TD = _append_zeros(x_TD, missing)
    mask_T = _append_zeros(ops.cast(mask_T, "int32"), missing)
    return x_TD, ops.cast(mask_T, "bool")


def split_tokens(x: Tensor | None, num_groups: int) -> Tensor | None:
    """Splits `(T, ...)` into `(G, T / G, ...)`, by order; `None` stays."""
    if x is None:
        return None
    rest = ops.shape(x)[1:]
    return sharding.constrain(
        ops.reshape(x, (num_groups, -1, *rest)),
        "batch",
        *[None] * (len(rest) + 1),
    )


def _append_zeros(x, num_rows):
    """`x` with rows of zeros, whole on every device before and after."""
    spec = [None] * len(x.shape)
    x = sharding.constrain(x, *spec)
    x = tf.pad(x, [[0, num_rows], *[[0, 0]] * (len(spec) - 1)])
    return sharding.constrain(x, *spec)
