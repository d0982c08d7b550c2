"""A loop that DTensor can lay out."""

import itertools

import tensorflow as tf

_NUMBERS = itertools.count()


def while_loop(cond, body, loop_vars):
    """`tf.while_loop`, one iteration after another, that works on a mesh too.

    There every variable must keep its layout, so `body` says it anew
    (`sharding.constrain`). Neither TensorLists nor `x[None]`, `x[1:]` have a
    layout inside: use `tf.slice`, `tf.squeeze`, `tf.expand_dims`.

    Args:
        cond, body, loop_vars: those of `tf.while_loop`.

    Returns:
        The last values.
    """
    # DTensor names functions after the loop, and programs of other shapes
    # must not have a function of the same name.
    name = f"mesh_loop_{next(_NUMBERS)}_"
    return tf.while_loop(
        cond, body, loop_vars, parallel_iterations=1, name=name
    )
