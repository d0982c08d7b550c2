"""The full softmax over the vocabulary, with or without a mesh."""

import tensorflow as tf
from keras import ops

from moe_tf import sharding
from moe_tf import xla
from moe_tf.layers.softmax import token_chunks
from moe_tf.layers.softmax import vocabulary_chunks
from moe_tf.types import Tensor

_CHUNK_BYTES = 64 * 2**20
# A GPU has more memory, and each chunk costs kernel launches.
_GPU_CHUNK_BYTES = 512 * 2**20
# Logits of at most this size are saved for the gradient.
MAX_SAVED_BYTES = 256 * 2**20


def logits(features: Tensor, kernel_VD: Tensor, dtype: str) -> Tensor:
    """Computes the logits of every word.

    Args:
        features: float `(..., D)`, of at most six axes.
        kernel_VD: float.
        dtype: of the operands of the product.

    Returns:
        Float32 `(..., V)`; float64 if `dtype` is float64.
    """
    features = ops.cast(features, dtype)
    leading = "ABLNT"[: len(features.shape) - 1]  # DTensor lacks "..."
    result = ops.einsum(
        f"{leading}D,VD->{leading}V", features, ops.cast(kernel_VD, dtype)
    )
    return ops.cast(result, token_chunks.logits_dtype(dtype))


def log_sum_and_target(
    features_TD: Tensor, kernel_VD: Tensor, targets_T: Tensor
) -> tuple[Tensor, Tensor]:
    """Computes each token's log-partition and the logit of its target.

    Logits are computed in chunks of 64 MiB, or of 512 MiB on a GPU, and a
    second time in the gradient.

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


def full_nll(
    features_TD: Tensor, kernel_VD: Tensor, targets_T: Tensor
) -> Tensor:
    """Computes the negative log-likelihood of the targets.

    Args:
        features_TD: float.
        kernel_VD: float.
        targets_T: int.

    Returns:
        Float32 `(T,)` in nats; float64 for float64 features.
    """
    log_sum_T, target_T = log_sum_and_target(features_TD, kernel_VD, targets_T)
    return log_sum_T - target_T


def nll_and_target(
    features_TD: Tensor, kernel_VD: Tensor, targets_T: Tensor
) -> tuple[Tensor, Tensor]:
    """Computes `full_nll` and the target's logit, faster for few logits.

    Logits of at most `MAX_SAVED_BYTES` are saved for the gradient. Larger
    ones are computed in chunks, and a second time in the gradient.

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

    def saved():
        return _saved_nll_and_target(features_TD, kernel_VD, targets_T)

    if sharding.axes() is not None:
        return chunked()
    max_tokens = MAX_SAVED_BYTES // (4 * kernel_VD.shape[0])
    if targets_T.shape[0] is None:
        return tf.cond(tf.size(targets_T) <= max_tokens, saved, chunked)
    return saved() if targets_T.shape[0] <= max_tokens else chunked()


def _saved_nll_and_target(features_TD, kernel_VD, targets_T):
    dtype = features_TD.dtype
    logits_TV = logits(features_TD, kernel_VD, dtype)
    nll_T = tf.nn.sparse_softmax_cross_entropy_with_logits(targets_T, logits_TV)
    rows_TD = ops.take(kernel_VD, targets_T, axis=0)
    sum_dtype = token_chunks.logits_dtype(dtype)
    target_T = ops.sum(
        ops.cast(features_TD, sum_dtype) * ops.cast(rows_TD, sum_dtype),
        axis=-1,
    )
    return nll_T, target_T
