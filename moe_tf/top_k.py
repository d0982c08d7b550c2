"""Faster searches than `tf.math.top_k` for the few largest entries of a row.

`blockwise_top_k` is for rows of thousands of entries, such as words, and
`small_top_k` for rows of up to some hundreds, such as experts. Both return
what `tf.math.top_k` returns.
"""

import math

import tensorflow as tf
from keras import ops

from moe_tf import sharding
from moe_tf import xla
from moe_tf.types import Tensor

BLOCK = 64

# TensorFlow's GPU kernel sorts rows of up to so many entries, one row after
# another within a block of threads. It searches longer rows.
_MAX_SORTED = 1000
# The argmax search reads each row `k` times. Above so many entries read in a
# row, the search among appended columns is faster. Milliseconds on an H100 of
# `tf.math.top_k`, argmax and appended columns: 16,384 rows of 8 columns, k = 3:
# 4.5, 0.84, 0.67; 8192 of 256, k = 5: 2.5, 1.8, 0.45. But where the rows lie on
# a CPU of the same machine, a search of 1001 columns for 8 takes 27 times as
# long, and argmax 1.2 times.
_MAX_READ = 1500


def blockwise_top_k(x_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the `k` largest entries of long rows, as `tf.math.top_k` does.

    The `k` largest entries lie in the `k` blocks with the largest maxima, so
    only these blocks are searched. Of equal entries the first comes first.

    Args:
        x_NV: float, without NaN; the indices of a row with NaN are valid but
            arbitrary. `V` must be static.
        k: int, at most `V`; the search is fast where `k` is far below `V`.

    Returns:
        `(values_NK, indices_NK)`, in descending order of the values.
    """
    size = x_NV.shape[1]
    num_blocks = -(-size // BLOCK)
    if num_blocks <= 2 * k:
        return tuple(tf.math.top_k(x_NV, k))
    padding = num_blocks * BLOCK - size
    if padding:
        x_NV = tf.pad(x_NV, [[0, 0], [0, padding]], constant_values=-math.inf)
    blocks_NGB = tf.reshape(x_NV, [-1, num_blocks, BLOCK])
    _, block_NK = tf.math.top_k(tf.reduce_max(blocks_NGB, axis=2), k)
    block_NK = tf.sort(block_NK, axis=1)  # for ties
    few_NX = tf.reshape(
        tf.gather(blocks_NGB, block_NK, batch_dims=1), [-1, k * BLOCK]
    )
    value_NK, at_NK = tf.math.top_k(few_NX, k)
    index_NK = BLOCK * tf.gather(block_NK, at_NK // BLOCK, batch_dims=1)
    # Padding is only taken for rows of nothing but `-inf` and NaN.
    return value_NK, tf.minimum(index_NK + at_NK % BLOCK, size - 1)


def small_top_k(x_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the `k` largest entries of short rows, as `tf.math.top_k` does.

    Of equal entries the first comes first. On a GPU outside XLA, rows that
    `tf.math.top_k` would sort are searched by `gpu_top_k_indices`. On a mesh
    the gradient stays on the device of each row.

    Args:
        x_NV: float `(..., V)`.
        k: int, at most `V`.

    Returns:
        `(values_NK, indices_NK)`, in descending order of the values. The
        integer type is that of `xla.as_index`.
    """
    searches = gpu_search_pays(x_NV.shape[-1])
    if searches:
        index_NK = gpu_top_k_indices(x_NV, k)
    else:
        value_NK, index_NK = ops.top_k(x_NV, k)
    if searches or sharding.axes() is not None:
        value_NK = take_entries(x_NV, index_NK)
    return value_NK, xla.as_index(index_NK)


def gpu_search_pays(num_columns: int) -> bool:
    """Returns whether `gpu_top_k_indices` is faster than `tf.math.top_k`."""
    return num_columns <= _MAX_SORTED and xla.runs_ops_on_gpu()


def gpu_top_k_indices(x_NV: Tensor, k: int) -> Tensor:
    """Returns the indices of `tf.math.top_k` without sorting the rows.

    Of equal entries the first comes first. NaN counts as infinity. Numbers
    below 0.99 of the least finite number count as that number. The indices of
    a row are distinct whatever the row holds.

    Args:
        x_NV: float `(..., V)`.
        k: int, at most `V`.

    Returns:
        int32 `(..., k)`.
    """
    x_NV = tf.convert_to_tensor(x_NV)
    infinity = tf.constant(float("inf"), x_NV.dtype)
    x_NV = tf.where(tf.math.is_nan(x_NV), infinity, x_NV)
    if k * x_NV.shape[-1] > _MAX_READ:
        return _indices_among_appended_columns(x_NV, k)
    return _indices_by_argmax(x_NV, k)


def _indices_among_appended_columns(x_NV, k):
    """Appends columns of `-inf`, so that TensorFlow searches and not sorts."""
    *leading, num_columns = ops.shape(x_NV)
    num_appended = max(0, _MAX_SORTED + 1 - num_columns)
    lowest = tf.fill(
        [*leading, num_appended], tf.constant(-float("inf"), x_NV.dtype)
    )
    return tf.math.top_k(tf.concat([x_NV, lowest], axis=-1), k).indices


def _indices_by_argmax(x_NV, k):
    """Takes the largest entry left of each row, `k` times."""
    num_columns, dtype = x_NV.shape[-1], x_NV.dtype
    # `-inf` marks the entries taken. The factor, since `argmax` does not find
    # the least number to be larger than `-inf`.
    smallest = tf.constant(0.99 * float(dtype.min), dtype)
    left_NV = tf.maximum(x_NV, smallest)
    indices = []
    for _ in range(k):
        index_N = tf.argmax(left_NV, axis=-1, output_type="int64")
        taken_NV = tf.one_hot(index_N, num_columns, True, False, dtype="bool")
        left_NV = tf.where(taken_NV, tf.constant(-float("inf"), dtype), left_NV)
        indices.append(index_N)
    return tf.cast(tf.stack(indices, axis=-1), "int32")


def take_entries(x_NV: Tensor, index_NK: Tensor) -> Tensor:
    """Returns the entries of each row at the row's indices.

    Args:
        x_NV: float `(..., V)`.
        index_NK: int `(..., K)`.

    Returns:
        float `(..., K)`.
    """
    leading = len(index_NK.shape) - 1

    def gather(x_NV):
        return tf.gather(x_NV, index_NK, batch_dims=leading)

    if sharding.axes() is None:
        return gather(x_NV)

    # On a mesh the gradient of `tf.gather` would be a scatter that each device
    # computes for the rows of all devices.
    @tf.custom_gradient
    def gather_on_mesh(x_NV):
        def gradient(dy_NK):
            return _add_at_indices(dy_NK, index_NK, x_NV.shape[-1])

        return gather(x_NV), gradient

    return gather_on_mesh(x_NV)


def _add_at_indices(y_NK, index_NK, size):
    """Zeros `(..., V)` to which `y` is added at the indices of each row."""
    index_NK = xla.as_index(index_NK)
    return sum(
        y_NK[..., j, None]
        * ops.one_hot(index_NK[..., j], size, dtype=y_NK.dtype)
        for j in range(index_NK.shape[-1])
    )
