"""Access of layers to the mesh in scope, independent of any strategy."""

import tensorflow as tf
from keras.src.backend.common import symbolic_scope

from moe_tf.types import Tensor


def axes() -> dict[str, int] | None:
    """Returns the axes of the mesh in scope, also while `fit` traces.

    Returns:
        dict from name to size. `None` where no mesh is in scope, and while
        Keras infers shapes.
    """
    strategy = _mesh_strategy()
    return None if strategy is None else strategy.axes


def expert_axis(axes: dict[str, int]) -> str:
    """Returns the axis that shards experts: `expert`, otherwise `batch`."""
    return "expert" if "expert" in axes else "batch"


def nearest_sizes(count: int, size: int) -> str:
    """Returns the divisors of `count` nearest to `size`, for error messages.

    Args:
        count: int, length that an axis of a mesh shards.
        size: int, size of the axis, which does not divide `count`.

    Returns:
        The next smaller and the next larger divisor, such as `"2 or 4"`; one
        of them where the other does not exist.
    """
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    below = [n for n in divisors if n < size][-1:]
    above = [n for n in divisors if n > size][:1]
    return " or ".join(map(str, below + above))


def constrain(tensor: Tensor, *spec: str | None) -> Tensor:
    """Lays a tensor out on the mesh in scope.

    Args:
        tensor: a `tf.Tensor`, eager or symbolic.
        *spec: for each dimension, the name of the axis that shards it, or
            `None`.

    Returns:
        The same values; `tensor` itself where no mesh is in scope.

    Raises:
        ValueError: if `spec` does not have one entry for each dimension,
            names an axis that the mesh does not have, or one whose size does
            not divide the dimension.
    """
    strategy = _mesh_strategy()
    return tensor if strategy is None else strategy.constrain(tensor, *spec)


def _mesh_strategy():
    if symbolic_scope.in_symbolic_scope():
        return None  # Keras infers shapes, of tensors that no device holds.
    strategy = tf.distribute.get_strategy()
    return strategy if hasattr(strategy, "constrain") else None
