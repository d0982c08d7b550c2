"""The whole softmax over the vocabulary, on a mesh and off it."""

import tensorflow as tf
from keras import ops

from moe_tf import sharding
from moe_tf.layers import token_chunks
from moe_tf.layers import vocabulary_chunks

KEPT_BYTES = 256 * 2**20


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
    return ops.cast(result, token_chunks.wide(dtype))


def log_sum_and_target(features_TD, kernel_VD, targets_T):
    """Log-partition of every token's logits, and its target's logit.

    Logits are computed 64 MiB at a time and again in the gradient.

    Args:
        features_TD: float.
        kernel_VD: float.
        targets_T: int.

    Returns:
        Two of float32 `(T,)`; float64 for float64 features.
    """
    on_mesh = sharding.axes() is not None
    chunks = vocabulary_chunks if on_mesh else token_chunks
    return chunks.log_sum_and_target(features_TD, kernel_VD, targets_T)


def full_nll(features_TD, kernel_VD, targets_T):
    """Negative log-likelihood of the targets, `(T,)`."""
    log_sum_T, target_T = log_sum_and_target(features_TD, kernel_VD, targets_T)
    return log_sum_T - target_T


def nll_and_target(features_TD, kernel_VD, targets_T):
    """`full_nll`, and the target's logit; quicker where logits are few.

    Those of at most `KEPT_BYTES` are kept for the gradient, which would
    otherwise compute them a second time.

    Args:
        features_TD: float.
        kernel_VD: float.
        targets_T: int.

    Returns:
        Two of float32 `(T,)`; float64 for float64 features.
    """
    num_tokens, vocabulary_size = targets_T.shape[0], kernel_VD.shape[0]
    needed = None if num_tokens is None else 4 * num_tokens * vocabulary_size
    if needed is None or needed > KEPT_BYTES or sharding.axes() is not None:
        log_sum_T, target_T = log_sum_and_target(
            features_TD, kernel_VD, targets_T
        )
        return log_sum_T - target_T, target_T
    dtype = features_TD.dtype
    logits_TV = logits(features_TD, kernel_VD, dtype)
    nll_T = tf.nn.sparse_softmax_cross_entropy_with_logits(targets_T, logits_TV)
    rows_TD = ops.take(kernel_VD, targets_T, axis=0)
    wide = token_chunks.wide(dtype)
    target_T = ops.sum(
        ops.cast(features_TD, wide) * ops.cast(rows_TD, wide), axis=-1
    )
    return nll_T, target_T
