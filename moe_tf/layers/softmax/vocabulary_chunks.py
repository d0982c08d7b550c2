"""The whole softmax in chunks of words, for a mesh.

Letters: `W` words of a chunk, the others of the project.
"""

import tensorflow as tf

from moe_tf import sharding

_CHUNK_BYTES = 64 * 2**20
_MOST_CHUNKS = 32


def full_nll(features_TD, kernel_VD, targets_T, chunk_bytes=_CHUNK_BYTES):
    """Negative log-likelihood of the targets: see `log_sum_and_target`."""
    log_sum_T, target_T = log_sum_and_target(
        features_TD, kernel_VD, targets_T, chunk_bytes
    )
    return log_sum_T - target_T


def log_sum_and_target(
    features_TD, kernel_VD, targets_T, chunk_bytes=_CHUNK_BYTES
):
    """That of `token_chunks`, chunk by chunk of words instead of tokens.

    Its loop writes TensorLists, which have no layout on a mesh. Here chunks
    are unrolled, at most 32, so that a device holds `chunk_bytes` of logits
    at a time or a thirty-second of all that its tokens have. They are
    computed a second time in the gradient. Tokens stay on their devices; the
    gradient of the kernel is summed over the devices.

    Args:
        features_TD: float; the number of tokens must be known.
        kernel_VD: float.
        targets_T: int.
        chunk_bytes: int.

    Returns:
        Two of float32 `(T,)`; float64 for float64 features.
    """
    wide = tf.float64 if features_TD.dtype == tf.float64 else tf.float32
    chunks = _chunks(features_TD.shape[0], kernel_VD.shape[0], chunk_bytes)
    targets_T = tf.cast(
        targets_T, "int64"
    )  # see `embedding_rows.replicate_ids`

    @tf.custom_gradient
    def run(features_TD, kernel_VD):
        weights_VD = tf.cast(kernel_VD, features_TD.dtype)
        if len(chunks) > 1:  # a sharded axis cannot be split
            weights_VD = sharding.constrain(weights_VD, None, None)
        rows = tf.split(weights_VD, chunks) if len(chunks) > 1 else [weights_VD]
        log_sum_T, target_T = _forward(features_TD, rows, targets_T, wide)

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
    """Sizes of the chunks."""
    devices = (sharding.axes() or {"batch": 1})["batch"]
    needed = 4 * vocabulary_size * -(-num_tokens // devices)
    number = -(-needed // chunk_bytes)
    number = max(1, min(number, _MOST_CHUNKS, vocabulary_size))
    size = -(-vocabulary_size // number)
    starts = range(0, vocabulary_size, size)
    return [min(size, vocabulary_size - start) for start in starts]


def _logits(features_TD, rows_WD, wide):
    return tf.cast(tf.matmul(features_TD, rows_WD, transpose_b=True), wide)


def _is_target(targets_T, start, size, dtype):
    """One where a word of the chunk is the token's target."""
    ids_1W = tf.expand_dims(start + tf.range(size, dtype="int64"), 0)
    return tf.cast(tf.equal(tf.expand_dims(targets_T, 1), ids_1W), dtype)


def _forward(features_TD, rows, targets_T, wide):
    """Log-partition and target logit of every token."""
    start, log_sum_T, target_T = 0, None, 0.0
    for rows_WD in rows:
        size = rows_WD.shape[0]
        if start:
            features_TD = _after(features_TD, tf.expand_dims(log_sum_T, 1))
        logits_TW = _logits(features_TD, rows_WD, wide)
        own_TW = _is_target(targets_T, start, size, wide)
        target_T += tf.reduce_sum(own_TW * logits_TW, axis=1)
        chunk_T = tf.reduce_logsumexp(logits_TW, axis=1)
        if start:
            most_T = tf.maximum(log_sum_T, chunk_T)
            chunk_T = most_T + tf.math.log(
                tf.exp(log_sum_T - most_T) + tf.exp(chunk_T - most_T)
            )
        log_sum_T = chunk_T
        start += size
    return log_sum_T, target_T


def _backward(features_TD, rows, targets_T, log_sum_T, upstreams_T):
    """Gradients of the features and, summed over tokens, of the kernel."""
    wide = log_sum_T.dtype
    upstream_T, target_upstream_T = upstreams_T
    start, features_grad_TD, kernel_grads = 0, None, []
    for rows_WD in rows:
        size = rows_WD.shape[0]
        if start:
            features_TD = _after(features_TD, features_grad_TD)
        error_TW = tf.exp(
            _logits(features_TD, rows_WD, wide) - tf.expand_dims(log_sum_T, 1)
        )
        error_TW *= tf.expand_dims(upstream_T, 1)
        own_TW = _is_target(targets_T, start, size, wide)
        error_TW += tf.expand_dims(target_upstream_T, 1) * own_TW
        error_TW = tf.cast(error_TW, features_TD.dtype)
        part_TD = tf.cast(tf.matmul(error_TW, rows_WD), wide)
        features_grad_TD = part_TD + (features_grad_TD if start else 0.0)
        kernel_grads.append(tf.matmul(error_TW, features_TD, transpose_a=True))
        start += size
    return features_grad_TD, tf.concat(kernel_grads, axis=0)


def _after(x_TD, earlier):
    """`x_TD`, once `earlier` is there: no two chunks at a time.

    DTensor drops control dependencies, so this is one of values.
    """
    never = tf.math.is_nan(earlier) & tf.math.is_inf(earlier)
    return tf.where(never, tf.zeros_like(x_TD), x_TD)
