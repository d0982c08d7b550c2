"""The few largest entries of each row, faster than `tf.math.top_k` finds them.

`wide_top_k` is for thousands of columns, such as words. `narrow_top_k` is for
some hundreds, such as experts, on a GPU outside XLA. There `tf.math.top_k`
sorts every row of up to 1000 columns, one after another within a block of
threads each, and searches longer rows.
"""

import math

import tensorflow as tf
from keras import ops

from moe_tf import xla

BLOCK = 64

_SORTED = 1000  # Columns up to which TensorFlow sorts.
# Entries that are read for a row, above which the longer search is faster.
# Milliseconds on an H100 of `top_k`, reading and the longer search: 16,384 rows
# of 8 columns, k = 3: 4.5, 0.84, 0.67; 8192 of 256, k = 5: 2.5, 1.8, 0.45. But
# where a CPU of the same machine has the rows, a search of 1001 columns for 8
# takes 27 times as long, and reading 1.2 times.
_READ = 1500


def wide_top_k(x_NV, k):
    """`tf.math.top_k(x_NV, k)` for a `k` far below a known `V`.

    Exactly the same, ties included: the smaller index comes first. The `k`
    largest entries lie in the `k` blocks of largest maxima, so that only
    those are searched.

    Args:
        x_NV: float, without NaN; a row with NaN gets indices that exist.
        k: int, at most `V`.

    Returns:
        `(values_NK, indices_NK)`.
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


def narrow_top_k_pays(num_columns):
    """Whether `narrow_top_k` is the faster way in this trace."""
    return num_columns <= _SORTED and xla.runs_ops_on_gpu()


def narrow_top_k(x_NV, k):
    """The indices that `tf.math.top_k` gives.

    Of equal entries the first comes first. NaN counts as infinity, what is
    below 0.99 of the least finite number as that, and the indices of a row are
    distinct whatever it holds.

    Args:
        x_NV: float `(..., V)`.
        k: int, at most `V`.

    Returns:
        int32 `(..., k)`.
    """
    x_NV = tf.convert_to_tensor(x_NV)
    infinity = tf.constant(float("inf"), x_NV.dtype)
    x_NV = tf.where(tf.math.is_nan(x_NV), infinity, x_NV)
    if k * x_NV.shape[-1] > _READ:
        return _search(x_NV, k)
    return _read(x_NV, k)


def _search(x_NV, k):
    *leading, num_columns = ops.shape(x_NV)
    more = max(0, _SORTED + 1 - num_columns)
    least = tf.fill([*leading, more], tf.constant(-float("inf"), x_NV.dtype))
    return tf.math.top_k(tf.concat([x_NV, least], axis=-1), k).indices


def _read(x_NV, k):
    num_columns, dtype = x_NV.shape[-1], x_NV.dtype
    # `-inf` marks what is taken; the least number is no larger to `argmax`.
    smallest = tf.constant(0.99 * float(dtype.min), dtype)
    left_NV = tf.maximum(x_NV, smallest)
    found = []
    for _ in range(k):
        index_N = tf.argmax(left_NV, axis=-1, output_type="int64")
        taken_NV = tf.one_hot(index_N, num_columns, True, False, dtype="bool")
        left_NV = tf.where(taken_NV, tf.constant(-float("inf"), dtype), left_NV)
        found.append(index_N)
    return tf.cast(tf.stack(found, axis=-1), "int32")
