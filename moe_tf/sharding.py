"""What layers need to know of a mesh, without knowing any strategy."""

import tensorflow as tf
from keras.src.backend.common import symbolic_scope


def axes():
    """The axes of the mesh in scope.

    Returns:
        dict from name to size, or None where no mesh is in scope. Also in
        the functions that `fit` traces; not while Keras works out shapes.
    """
    strategy = _mesh_strategy()
    return None if strategy is None else strategy.axes


def expert_axis(axes):
    """The axis that experts are sharded over: `expert`, else `batch`."""
    return "expert" if "expert" in axes else "batch"


def nearest_sizes(number, size):
    """Divisors of `number` next to `size`, which is none: text of one or two.

    Args:
        number: int, of what an axis is to share.
        size: int, of the axis.
    """
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    below = [n for n in divisors if n < size][-1:]
    above = [n for n in divisors if n > size][:1]
    return " or ".join(map(str, below + above))


def constrain(tensor, *spec):
    """`tensor`, laid out on the mesh in scope as `spec` says.

    Args:
        tensor: a `tf.Tensor`, eager or symbolic.
        *spec: for each dimension the name of an axis or None.

    Returns:
        The same values; `tensor` itself where no mesh is in scope.

    Raises:
        ValueError: `spec` has not one entry for each dimension, names an axis
            that the mesh has not, or one whose size does not divide the
            dimension.
    """
    strategy = _mesh_strategy()
    return tensor if strategy is None else strategy.constrain(tensor, *spec)


def _mesh_strategy():
    if symbolic_scope.in_symbolic_scope():
        return None  # Keras asks for shapes: nothing lies anywhere.
    strategy = tf.distribute.get_strategy()
    return strategy if hasattr(strategy, "constrain") else None
