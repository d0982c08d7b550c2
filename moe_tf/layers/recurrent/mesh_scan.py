"""A loop over the positions of sequences that DTensor can lay out.

`tf.scan`, `tf.TensorArray` and gradients of `tf.while_loop` keep what they
gather in TensorLists, which have no layout on a mesh. Here it goes into plain
tensors.
"""

import itertools
import math

import tensorflow as tf

from moe_tf import sharding

_NUMBERS = itertools.count()
# Of one iteration. More make a larger program; fewer start more kernels, and
# copy what has been gathered more often.
_MOST_POSITIONS = 4


def scan(step, sequences, widths, reverse=False):
    """Calls `step` at one position after another.

    Sequences are shared by the devices along `batch`, whose number must
    divide `B`. For use inside `tf.custom_gradient`.

    Args:
        step: function of `(states, rows)` that returns the next states and
            the outputs. All are sequences of tensors `(B, D)`: `rows` one of
            each of `sequences`, states and outputs one of each of `widths`.
        sequences: list of tensors `(L, B, D)`, of known sizes and one dtype;
            `D` may differ.
        widths: ints, `D` of each state. States are zeros at first.
        reverse: bool, whether to go from the last position to the first.

    Returns:
        List of the outputs, `(L, B, D)`; the first belongs to position 0.
    """
    length = sequences[0].shape[0]
    number, extra = _positions(length)
    # Where the loop comes last, so that nothing follows from it.
    sequences = [_filled(x_LBD, extra, reverse) for x_LBD in sequences]
    outputs = _scan_filled(step, sequences, widths, number, reverse)
    start = extra if reverse else 0
    return [
        tf.slice(x_LBD, [start, 0, 0], [length, *x_LBD.shape[1:]])
        if extra
        else x_LBD
        for x_LBD in outputs
    ]


def _scan_filled(step, sequences, widths, number, reverse):
    """The same, where an iteration of so many positions divides the length."""
    length, batch, _ = sequences[0].shape
    put = _prepend if reverse else _append

    def advance(t, *carried):
        states, gathered = carried[: len(widths)], carried[len(widths) :]
        first = length - number - t if reverse else t
        read = [_read(x_LBD, first, number) for x_LBD in sequences]
        outputs = []
        for rows in list(zip(*read, strict=True))[:: -1 if reverse else 1]:
            states, found = step(states, rows)
            outputs.append(found)
        outputs = outputs[:: -1 if reverse else 1]
        gathered = map(put, gathered, zip(*outputs, strict=True))
        return t + number, *map(sharded_by_batch, states), *gathered

    def zeros(*shape):
        return sharded_by_batch(tf.zeros(shape, sequences[0].dtype))

    states = [zeros(batch, width) for width in widths]
    gathered = [zeros(length, batch, width) for width in widths]
    # DTensor names functions after the loop, and programs of other shapes
    # must not have a function of the same name.
    _, *last = tf.while_loop(
        lambda t, *_: t < length,
        advance,
        (0, *states, *gathered),
        parallel_iterations=1,
        name=f"mesh_loop_{next(_NUMBERS)}_",
    )
    return last[len(widths) :]


def delayed(x_LBD):
    """What stood one position before; zeros at the first."""
    return _prepend(x_LBD, [tf.zeros(x_LBD.shape[1:], x_LBD.dtype)])


def sharded_by_batch(x):
    """`x (..., B, D)`, sequences shared by the devices along `batch`.

    Loops want it said: their variables must keep their layout.
    """
    return sharding.constrain(x, *(None,) * (x.shape.rank - 2), "batch", None)


def _positions(length):
    """How many an iteration has, and how many the length then lacks."""
    iterations = max(1, math.ceil(length / _MOST_POSITIONS))
    number = math.ceil(length / iterations)
    return number, number * iterations - length


def _filled(x_LBD, extra, in_front):
    """`x_LBD` with so many positions of zeros more."""
    if not extra:
        return x_LBD
    zeros = sharded_by_batch(tf.zeros((extra, *x_LBD.shape[1:]), x_LBD.dtype))
    parts = [zeros, x_LBD] if in_front else [x_LBD, zeros]
    return sharded_by_batch(tf.concat(parts, axis=0))


def _read(x_LBD, first, number):
    """Rows `(B, D)` of so many positions, from `first` on."""
    # A gather wants `first` on the device, which holds up a GPU each time.
    _, batch, width = x_LBD.shape
    return tf.unstack(tf.slice(x_LBD, [first, 0, 0], [number, batch, width]))


# Positions come one after the other, so arrays that move on are full at the
# end. `tf.tensor_scatter_nd_update` copies all positions as well, and on GPUs
# has no bfloat16: it goes by way of the host.


def _append(x_LBD, rows):
    """`x_LBD` without its first positions, and `rows` as the last."""
    length, batch, width = x_LBD.shape
    start, kept = [len(rows), 0, 0], [length - len(rows), batch, width]
    later = tf.slice(x_LBD, start, kept)
    new = [tf.expand_dims(row_BD, 0) for row_BD in rows]
    return sharded_by_batch(tf.concat([later, *new], axis=0))


def _prepend(x_LBD, rows):
    """`x_LBD` without its last positions, and `rows` as the first."""
    length, batch, width = x_LBD.shape
    # Not `x[:-1]`, here and above: strided slices of two kinds have no layout.
    kept = [length - len(rows), batch, width]
    earlier = tf.slice(x_LBD, [0, 0, 0], kept)
    new = [tf.expand_dims(row_BD, 0) for row_BD in rows]
    return sharded_by_batch(tf.concat([*new, earlier], axis=0))
