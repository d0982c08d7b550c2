"""Grouped matmul: a function of rows and kernels, for many experts at once."""

from collections.abc import Callable
from collections.abc import Sequence

import tensorflow as tf
from keras import ops

from moe_tf import sharding
from moe_tf.types import Tensor

# More experts run in a loop. It takes 1.4 times as long (256 experts of 512 by
# 1024) to 2.4 times (2048 of 64 by 128), but the unrolled graph of 1024 experts
# takes 15 s until its first step is done, that of 2048 42 s.
_UNROLLED = 1024


def apply_to_rows(
    function: Callable[..., Tensor],
    x_SD: Tensor,
    kernels: Sequence[Tensor],
    count_E: Tensor,
) -> Tensor:
    """Calls `function` for each expert, over as many rows as it has.

    Args:
        function: see `Plan.apply`.
        x_SD: float, the rows expert by expert.
        kernels: float tensors `(E, I, O)`.
        count_E: int32, the number of rows of each expert. The rows after
            these belong to none.

    Returns:
        Float `(S, O)`; zeros in rows that belong to no expert.
    """
    num_experts = kernels[0].shape[0]
    if num_experts > _UNROLLED:
        return _apply_to_rows_in_a_loop(function, x_SD, kernels, count_E)
    rest = ops.shape(x_SD)[0] - ops.sum(count_E)  # rows of masked tokens
    *rows, rows_rest = tf.split(
        x_SD, ops.append(count_E, rest), num=num_experts + 1
    )
    parts = [
        function(*arguments)
        for arguments in zip(rows, *map(tf.unstack, kernels), strict=True)
    ]
    zeros = tf.zeros([ops.shape(rows_rest)[0], parts[0].shape[-1]], x_SD.dtype)
    return tf.concat([*parts, zeros], axis=0)


def apply_to_blocks(
    function: Callable[..., Tensor], x_SD: Tensor, kernels: Sequence[Tensor]
) -> Tensor:
    """Calls `function` once, over a batch of blocks of equal size.

    Args:
        function: see `Plan.apply`.
        x_SD: float, `S` a multiple of `N`.
        kernels: float tensors `(N, I, O)`, one matrix for each block.
    """
    num_slots, width = ops.shape(x_SD)[0], x_SD.shape[-1]
    num_blocks = ops.shape(kernels[0])[0]
    x_NCD = ops.reshape(x_SD, (num_blocks, num_slots // num_blocks, width))
    y_NCO = function(x_NCD, *kernels)
    return ops.reshape(y_NCO, (num_slots, y_NCO.shape[-1]))


def matmul(x: Tensor, kernel: Tensor) -> Tensor:
    """Multiplies `(..., C, I)` and `(..., I, O)`, in functions of a plan."""
    if len(x.shape) > 2:
        return tf.matmul(x, kernel)

    # On a CPU the product of a few rows with a transposed matrix, a third of
    # the work, takes half as long as a batch of one (64 rows, 512 by 1024).
    @tf.custom_gradient
    def product(x_CI, kernel_IO):
        def gradient(dy_CO):
            dx_1CI = tf.matmul(
                tf.expand_dims(dy_CO, 0),
                tf.expand_dims(kernel_IO, 0),
                transpose_b=True,
            )
            dkernel_IO = tf.matmul(x_CI, dy_CO, transpose_a=True)
            return tf.squeeze(dx_1CI, 0), dkernel_IO

        return tf.matmul(x_CI, kernel_IO), gradient

    return product(x, kernel)


def recomputed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wraps `function` so that the backward pass computes it again.

    Intermediate values are then not kept for the backward pass, at the cost
    of a second forward pass. `tf.recompute_grad` copies all arguments, the
    kernels among them. Here only the first argument, the rows, depends on
    the incoming gradient, so that neither Grappler nor XLA can merge the two
    computations.

    Args:
        function: takes tensors, the first of them float, and returns one.
    """

    @tf.custom_gradient
    def run(x, *kernels):
        def gradient(dy):
            # One entry would do, but on a mesh it is on one device.
            some = dy if sharding.axes() else tf.reshape(dy, [-1])[:1]
            some = ops.cast(some, x.dtype)
            zero = ops.sum(ops.minimum(ops.abs(some), 0))
            with tf.GradientTape() as tape:
                tape.watch((x, *kernels))
                y = function(x + zero, *kernels)
            return tape.gradient(y, (x, *kernels), output_gradients=dy)

        return function(x, *kernels), gradient

    return run


def _apply_to_rows_in_a_loop(function, x_SD, kernels, count_E):
    """The same in a graph that does not grow with the experts."""
    num_experts = kernels[0].shape[0]
    width = function(x_SD[:0], *(kernel[0] for kernel in kernels)).shape[-1]

    def array(matrices, size):
        return tf.TensorArray(
            x_SD.dtype, size, infer_shape=False, element_shape=matrices
        )

    rest = ops.shape(x_SD)[0] - ops.sum(count_E)  # rows of masked tokens
    sizes = ops.append(count_E, rest)
    rows = array([None, x_SD.shape[-1]], num_experts + 1).split(x_SD, sizes)
    matrices = [
        array(kernel.shape[1:], num_experts).unstack(kernel)
        for kernel in kernels
    ]

    def run(e, parts):
        arguments = [matrix.read(e) for matrix in matrices]
        return e + 1, parts.write(e, function(rows.read(e), *arguments))

    _, parts = tf.while_loop(
        lambda e, parts: e < num_experts,
        run,
        (0, array([None, width], num_experts + 1)),
    )
    zeros = tf.zeros([rest, width], x_SD.dtype)
    return parts.write(num_experts, zeros).concat()
