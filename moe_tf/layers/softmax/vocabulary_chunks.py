"""The full softmax on a mesh, computed in chunks of words.

Letters: `W` words of a chunk.
"""

import tensorflow as tf

from moe_tf import sharding
from moe_tf.types import Tensor

_CHUNK_BYTES = 64 * 2**20
_MAX_CHUNKS = 32


def full_nll(
    features_TD: Tensor,
    kernel_VD: Tensor,
    targets_T: Tensor,
    chunk_bytes: int = _CHUNK_BYTES,
) -> Tensor:
    """Computes the targets' negative log-likelihood by `log_sum_and_target`."""
    log_sum_T, target_T = log_sum_and_target(
        features_TD, kernel_VD, targets_T, chunk_bytes
    )
    return log_sum_T - target_T


def log_sum_and_target(
    features_TD: Tensor,
    kernel_VD: Tensor,
    targets_T: Tensor,
    chunk_bytes: int = _CHUNK_BYTES,
) -> tuple[Tensor, Tensor]:
    """Computes each token's log-partition and the logit of its target.

    The loop of `token_chunks` writes TensorLists, which have no layout on a
    mesh. Here the vocabulary is split instead of the tokens, and the chunks
    are unrolled. There are at most 32, so a device holds `chunk_bytes` of
    logits at a time, or a thirty-second of its tokens' logits. Logits are
    computed a second time in the gradient. Tokens stay on their devices; the
    gradient of the kernel is all-reduced.

    Args:
        features_TD: float; the number of tokens must be known.
        kernel_VD: float.
        targets_T: int.
        chunk_bytes: int.

    Returns:
        Two of float32 `(T,)`; float64 for float64 features.
    """
    dtype = tf.float64 if features_TD.dtype == tf.float64 else tf.float32
    chunks = _chunks(features_TD.shape[0], kernel_VD.shape[0], chunk_bytes)
    # int64: see `embedding_rows.replicate_ids`.
    targets_T = tf.cast(targets_T, "int64")

    @tf.custom_gradient
    def run(features_TD, kernel_VD):
        weights_VD = tf.cast(kernel_VD, features_TD.dtype)
        if len(chunks) > 1:  # a sharded axis cannot be split
            weights_VD = sharding.constrain(weights_VD, None, None)
        rows = tf.split(weights_VD, chunks) if len(chunks) > 1 else [weights_VD]
        log_sum_T, target_T = _forward(features_TD, rows, targets_T, dtype)

        def gradient(*upstreams_T):
            features_grad_TD, kernel_grad_VD = _backward(
                features_TD, rows, targets_T, log_sum_T, upstreams_T
            )
            return (
                tf.cast(features_grad_TD, features_TD.dtype),
                tf.cast(kernel_grad_VD, kernel_VD.dtype),
            )

        return (log_sum_T, target_T), gradient

    return run(features_TD, tf.convert_to_tensor(kernel_VD))


def _chunks(num_tokens, vocabulary_size, chunk_bytes):
    """Returns the number of words of each chunk."""
    devices = (sharding.axes() or {"batch": 1})["batch"]
    needed = 4 * vocabulary_size * -(-num_tokens // devices)
    num_chunks = -(-needed // chunk_bytes)
    num_chunks = max(1, min(num_chunks, _MAX_CHUNKS, vocabulary_size))
    size = -(-vocabulary_size // num_chunks)
    starts = range(0, vocabulary_size, size)
    return [min(size, vocabulary_size - start) for start in starts]


def _logits(features_TD, rows_WD, dtype):
    return tf.cast(tf.matmul(features_TD, rows_WD, transpose_b=True), dtype)


def _is_target(targets_T, start, size, dtype):
    """Returns 1 where a word of the chunk is the token's target, else 0."""
    ids_1W = tf.expand_dims(start + tf.range(size, dtype="int64"), 0)
    return tf.cast(tf.equal(tf.expand_dims(targets_T, 1), ids_1W), dtype)


def _forward(features_TD, rows, targets_T, dtype):
    """Computes the log-partition and the target's logit of every token."""
    start, log_sum_T, target_T = 0, None, 0.0
    for rows_WD in rows:
        size = rows_WD.shape[0]
        if start:
            features_TD = _after(features_TD, tf.expand_dims(log_sum_T, 1))
        logits_TW = _logits(features_TD, rows_WD, dtype)
        own_TW = _is_target(targets_T, start, size, dtype)
        target_T += tf.reduce_sum(own_TW * logits_TW, axis=1)
        chunk_T = tf.reduce_logsumexp(logits_TW, axis=1)
        if start:
            max_T = tf.maximum(log_sum_T, chunk_T)
            chunk_T = max_T + tf.math.log(
                tf.exp(log_sum_T - max_T) + tf.exp(chunk_T - max_T)
            )
        log_sum_T = chunk_T
        start += size
    return log_sum_T, target_T


def _backward(features_TD, rows, targets_T, log_sum_T, upstreams_T):
    """Computes the gradients of the features and of the kernel."""
    dtype = log_sum_T.dtype
    upstream_T, target_upstream_T = upstreams_T
    start, features_grad_TD, kernel_grads = 0, None, []
    for rows_WD in rows:
        size = rows_WD.shape[0]
        if start:
            features_TD = _after(features_TD, features_grad_TD)
        error_TW = tf.exp(
            _logits(features_TD, rows_WD, dtype) - tf.expand_dims(log_sum_T, 1)
        )
        error_TW *= tf.expand_dims(upstream_T, 1)
        own_TW = _is_target(targets_T, start, size, dtype)
        error_TW += tf.expand_dims(target_upstream_T, 1) * own_TW
        error_TW = tf.cast(error_TW, features_TD.dtype)
        part_TD = tf.cast(tf.matmul(error_TW, rows_WD), dtype)
        features_grad_TD = part_TD + (features_grad_TD if start else 0.0)
        kernel_grads.append(tf.matmul(error_TW, features_TD, transpose_a=True))
        start += size
    return features_grad_TD, tf.concat(kernel_grads, axis=0)


def _after(x_TD, earlier):
    """Returns `x_TD` after `earlier` is computed: one chunk at a time.

    DTensor drops control dependencies, so this is a dependency of values.
    """
    never = tf.math.is_nan(earlier) & tf.math.is_inf(earlier)
    return tf.where(never, tf.zeros_like(x_TD), x_TD)
