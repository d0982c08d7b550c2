"""A loop over the positions of sequences on a mesh.

`tf.scan`, `tf.TensorArray` and gradients of `tf.while_loop` collect outputs in
TensorLists, which have no DTensor layout. Here plain tensors collect them.
"""

import itertools
import math
from collections.abc import Callable
from collections.abc import Sequence

import tensorflow as tf

from moe_tf import sharding
from moe_tf.types import Tensor

_loop_numbers = itertools.count()
# Per iteration of the loop. More make a larger program; fewer launch more
# operations and copy the collected outputs more often.
_MAX_POSITIONS = 4


def scan(
    step: Callable,
    sequences: Sequence[Tensor],
    widths: Sequence[int],
    reverse: bool = False,
) -> list[Tensor]:
    """Calls `step` at one position after another.

    The sequences are sharded over `batch`, whose size must divide `B`. The
    loop has no gradient: call it inside `tf.custom_gradient`.

    Args:
        step: function of `(states, inputs)` that returns the next states and
            the outputs, each a sequence of tensors `(B, D)`. There is one
            input for each of `sequences`, one state and one output for each
            of `widths`.
        sequences: list of tensors `(L, B, D)`, of known sizes and one dtype;
            `D` may differ.
        widths: ints, `D` of each state. The initial states are zeros.
        reverse: bool, whether to go from the last position to the first.

    Returns:
        List of the outputs, `(L, B, D)`; the first belongs to position 0.
    """
    length = sequences[0].shape[0]
    per_iteration, extra = _split_positions(length)
    # The loop reaches the padding last, so no output depends on it.
    sequences = [_padded(x_LBD, extra, reverse) for x_LBD in sequences]
    outputs = _scan_padded(step, sequences, widths, per_iteration, reverse)
    start = extra if reverse else 0
    return [
        tf.slice(x_LBD, [start, 0, 0], [length, *x_LBD.shape[1:]])
        if extra
        else x_LBD
        for x_LBD in outputs
    ]


def _scan_padded(step, sequences, widths, per_iteration, reverse):
    """Runs `scan` over sequences whose length `per_iteration` divides."""
    length, batch, _ = sequences[0].shape
    put = _prepend if reverse else _append

    def advance(t, *carried):
        states, collected = carried[: len(widths)], carried[len(widths) :]
        first = length - per_iteration - t if reverse else t
        read = [_read(x_LBD, first, per_iteration) for x_LBD in sequences]
        outputs = []
        for inputs in list(zip(*read, strict=True))[:: -1 if reverse else 1]:
            states, new_outputs = step(states, inputs)
            outputs.append(new_outputs)
        outputs = outputs[:: -1 if reverse else 1]
        collected = map(put, collected, zip(*outputs, strict=True))
        return t + per_iteration, *map(sharded_by_batch, states), *collected

    def zeros(*shape):
        return sharded_by_batch(tf.zeros(shape, sequences[0].dtype))

    states = [zeros(batch, width) for width in widths]
    collected = [zeros(length, batch, width) for width in widths]
    # DTensor names functions after the loop. Loops over other shapes must not
    # have a function of the same name.
    _, *last = tf.while_loop(
        lambda t, *_: t < length,
        advance,
        (0, *states, *collected),
        parallel_iterations=1,
        name=f"mesh_scan_{next(_loop_numbers)}_",
    )
    return last[len(widths) :]


def delayed(x_LBD: Tensor) -> Tensor:
    """Shifts `x` by one position; the first position becomes zeros."""
    return _prepend(x_LBD, [tf.zeros(x_LBD.shape[1:], x_LBD.dtype)])


def sharded_by_batch(x: Tensor) -> Tensor:
    """Constrains `x (..., B, D)` to be sharded over `batch` along `B`.

    DTensor needs this for loop variables, whose layout must not change
    between iterations.
    """
    return sharding.constrain(x, *(None,) * (x.shape.rank - 2), "batch", None)


def _split_positions(length):
    """Returns positions per iteration, and positions of padding to add."""
    iterations = max(1, math.ceil(length / _MAX_POSITIONS))
    per_iteration = math.ceil(length / iterations)
    return per_iteration, per_iteration * iterations - length


def _padded(x_LBD, extra, in_front):
    """Pads `x` with `extra` positions of zeros."""
    if not extra:
        return x_LBD
    zeros = sharded_by_batch(tf.zeros((extra, *x_LBD.shape[1:]), x_LBD.dtype))
    parts = [zeros, x_LBD] if in_front else [x_LBD, zeros]
    return sharded_by_batch(tf.concat(parts, axis=0))


def _read(x_LBD, first, count):
    """Returns `count` positions from `first` on, each `(B, D)`."""
    # A gather would copy `first` to the GPU, which waits for it each time.
    _, batch, width = x_LBD.shape
    return tf.unstack(tf.slice(x_LBD, [first, 0, 0], [count, batch, width]))


# The collected arrays shift by the new positions, and are full at the end.
# `tf.tensor_scatter_nd_update` copies all positions too, and has no bfloat16
# kernel for GPUs: it would run on the host.


def _append(x_LBD, rows):
    """Drops the first positions of `x` and appends `rows`."""
    length, batch, width = x_LBD.shape
    start, kept = [len(rows), 0, 0], [length - len(rows), batch, width]
    later = tf.slice(x_LBD, start, kept)
    new = [tf.expand_dims(row_BD, 0) for row_BD in rows]
    return sharded_by_batch(tf.concat([later, *new], axis=0))


def _prepend(x_LBD, rows):
    """Drops the last positions of `x` and prepends `rows`."""
    length, batch, width = x_LBD.shape
    # Not `x[:-1]`, here and above: some strided slices have no layout.
    kept = [length - len(rows), batch, width]
    earlier = tf.slice(x_LBD, [0, 0, 0], kept)
    new = [tf.expand_dims(row_BD, 0) for row_BD in rows]
    return sharded_by_batch(tf.concat([*new, earlier], axis=0))
