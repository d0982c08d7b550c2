"""The whole softmax over the vocabulary, on a mesh and off it."""

import tensorflow as tf
from keras import ops

from moe_tf import sharding
from moe_tf import xla
from moe_tf.layers.softmax import token_chunks
from moe_tf.layers.softmax import vocabulary_chunks

_CHUNK_BYTES = 64 * 2**20
# Each chunk costs launches, and memory is plenty.
_GPU_CHUNK_BYTES = 512 * 2**20
# Logits that are kept for the gradient.
MAX_SAVED_BYTES = 256 * 2**20


def logits(features, kernel_VD, dtype):
    """Logits of every word.

    Args:
        features: float `(..., D)`, of at most six axes.
        kernel_VD: float.
        dtype: that of the products.

    Returns:
        Float32 `(..., V)`, or what is wider.
    """
    features = ops.cast(features, dtype)
    leading = "ABLNT"[: len(features.shape) - 1]  # DTensor lacks "..."
    result = ops.einsum(
        f"{leading}D,VD->{leading}V", features, ops.cast(kernel_VD, dtype)
    )
    return ops.cast(result, token_chunks.logits_dtype(dtype))


def log_sum_and_target(features_TD, kernel_VD, targets_T):
    """Log-partition of every token's logits, and its target's logit.

    Logits are computed 64 MiB at a time, on a GPU 512, and again in the
    gradient.

    Args:
        features_TD: float.
        kernel_VD: float.
        targets_T: int.

    Returns:
        Two of float32 `(T,)`; float64 for float64 features.
    """
    if sharding.axes() is not None:
        return vocabulary_chunks.log_sum_and_target(
            features_TD, kernel_VD, targets_T
        )
    chunk_bytes = _GPU_CHUNK_BYTES if xla.on_gpu(kernel_VD) else _CHUNK_BYTES
    return token_chunks.log_sum_and_target(
        features_TD, kernel_VD, targets_T, chunk_bytes
    )


def full_nll(features_TD, kernel_VD, targets_T):
    """Negative log-likelihood of the targets, `(T,)`."""
    log_sum_T, target_T = log_sum_and_target(features_TD, kernel_VD, targets_T)
    return log_sum_T - target_T


def nll_and_target(features_TD, kernel_VD, targets_T):
    """`full_nll`, and the target's logit; quicker where logits are few.

    Those of at most `MAX_SAVED_BYTES` are kept for the gradient, which would
    otherwise compute them a second time.

    Args:
        features_TD: float.
        kernel_VD: float.
        targets_T: int.

    Returns:
        Two of float32 `(T,)`; float64 for float64 features.
    """

    def chunked():
        log_sum_T, target_T = log_sum_and_target(
            features_TD, kernel_VD, targets_T
        )
        return log_sum_T - target_T, target_T

    def kept():
        return _kept_nll_and_target(features_TD, kernel_VD, targets_T)

    if sharding.axes() is not None:
        return chunked()
    most = MAX_SAVED_BYTES // (4 * kernel_VD.shape[0])
    if targets_T.shape[0] is None:
        return tf.cond(tf.size(targets_T) <= most, kept, chunked)
    return kept() if targets_T.shape[0] <= most else chunked()


def _kept_nll_and_target(features_TD, kernel_VD, targets_T):
    dtype = features_TD.dtype
    logits_TV = logits(features_TD, kernel_VD, dtype)
    nll_T = tf.nn.sparse_softmax_cross_entropy_with_logits(targets_T, logits_TV)
    rows_TD = ops.take(kernel_VD, targets_T, axis=0)
    wide = token_chunks.logits_dtype(dtype)
    target_T = ops.sum(
        ops.cast(features_TD, wide) * ops.cast(rows_TD, wide), axis=-1
    )
    return nll_T, target_T
