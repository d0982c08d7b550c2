"""The full softmax, computed in chunks of tokens.

Letters: `X` tokens of one chunk, `N` chunks.
"""

import keras
import tensorflow as tf
from keras import ops

from moe_tf.types import Tensor


def full_nll(
    features_TD: Tensor, kernel_VD: Tensor, targets_T: Tensor, chunk_bytes: int
) -> Tensor:
    """Computes the targets' negative log-likelihood by `log_sum_and_target`."""
    log_sum_T, target_T = log_sum_and_target(
        features_TD, kernel_VD, targets_T, chunk_bytes
    )
    return log_sum_T - target_T


def log_sum_and_target(
    features_TD: Tensor, kernel_VD: Tensor, targets_T: Tensor, chunk_bytes: int
) -> tuple[Tensor, Tensor]:
    """Computes each token's log-partition and the logit of its target.

    At most about `chunk_bytes` of logits exist at a time. The gradient
    computes them a second time, within the same limit, and has no gradient of
    its own. Products have the dtype of the features; sums are float32 or a
    higher precision.

    Args:
        features_TD: float.
        kernel_VD: float.
        targets_T: int.
        chunk_bytes: int.

    Returns:
        Two of float32 `(T,)`; float64 for float64 features.
    """
    max_tokens = max(1, chunk_bytes // (4 * kernel_VD.shape[0]))
    targets_NX = _chunks(targets_T, max_tokens)

    @tf.custom_gradient
    def run(features_NXD, kernel_VD):
        weights_VD = ops.cast(kernel_VD, features_NXD.dtype)
        log_sum_NX, target_NX = _forward(features_NXD, weights_VD, targets_NX)

        def gradient(*upstreams_NX):
            features_grad_NXD, kernel_grad_VD = _backward(
                features_NXD, weights_VD, targets_NX, log_sum_NX, upstreams_NX
            )
            return features_grad_NXD, ops.cast(kernel_grad_VD, kernel_VD.dtype)

        return (log_sum_NX, target_NX), gradient

    # Not a variable: `custom_gradient` would require its gradient by name.
    results_NX = run(
        _chunks(features_TD, max_tokens), tf.convert_to_tensor(kernel_VD)
    )
    num_tokens = ops.shape(targets_T)[0]
    return tuple(
        ops.reshape(result_NX, (-1,))[:num_tokens] for result_NX in results_NX
    )


def _chunks(x_T, max_tokens):
    """Splits the first axis into equal chunks of at most `max_tokens`."""
    total = ops.shape(x_T)[0]
    num_chunks = ops.maximum(1, (total + max_tokens - 1) // max_tokens)
    size = (total + num_chunks - 1) // num_chunks
    missing = num_chunks * size - total
    zeros = ops.zeros((missing, *x_T.shape[1:]), dtype=x_T.dtype)
    padded = ops.concatenate([x_T, zeros], axis=0)
    return ops.reshape(padded, (num_chunks, size, *x_T.shape[1:]))


def logits_dtype(dtype: str | tf.DType) -> str:
    """Returns the dtype of logits and sums: float32, or a higher precision."""
    return keras.backend.result_type(dtype, "float32")


def _logits(features_XD, weights_VD):
    logits_XV = ops.einsum("XD,VD->XV", features_XD, weights_VD)
    return ops.cast(logits_XV, logits_dtype(weights_VD.dtype))


def _forward(features_NXD, weights_VD, targets_NX):
    """Computes the log-partition and the target's logit of every token."""
    sum_dtype = logits_dtype(weights_VD.dtype)

    def one_chunk(chunk):
        features_XD, targets_X = chunk
        logits_XV = _logits(features_XD, weights_VD)
        target_X1 = ops.take_along_axis(logits_XV, targets_X[:, None], axis=1)
        return ops.logsumexp(logits_XV, axis=1), target_X1[:, 0]

    return tf.map_fn(
        one_chunk,
        (features_NXD, targets_NX),
        fn_output_signature=(sum_dtype, sum_dtype),
        parallel_iterations=1,
    )


def _backward(features_NXD, weights_VD, targets_NX, log_sum_NX, upstreams_NX):
    """Computes the gradients of the features and of the kernel."""
    dtype, sum_dtype = weights_VD.dtype, logits_dtype(weights_VD.dtype)
    vocabulary_size = weights_VD.shape[0]
    num_chunks = tf.shape(features_NXD)[0]

    def add_chunk(index, kernel_grad_VD, features_grads):
        features_XD = features_NXD[index]
        upstream_X, target_upstream_X = (up[index] for up in upstreams_NX)
        logits_XV = _logits(features_XD, weights_VD)
        error_XV = ops.exp(logits_XV - log_sum_NX[index][:, None])
        error_XV *= upstream_X[:, None]
        error_XV += target_upstream_X[:, None] * ops.one_hot(
            targets_NX[index], vocabulary_size, dtype=sum_dtype
        )
        error_XV = ops.cast(error_XV, dtype)
        kernel_grad_VD += ops.cast(
            ops.einsum("XV,XD->VD", error_XV, features_XD), sum_dtype
        )
        features_grad_XD = ops.einsum("XV,VD->XD", error_XV, weights_VD)
        features_grads = features_grads.write(index, features_grad_XD)
        return index + 1, kernel_grad_VD, features_grads

    _, kernel_grad_VD, features_grads = tf.while_loop(
        lambda index, *_: index < num_chunks,
        add_chunk,
        (
            0,
            ops.zeros(weights_VD.shape, dtype=sum_dtype),
            tf.TensorArray(dtype, size=num_chunks),
        ),
        parallel_iterations=1,
    )
    return (
        ops.reshape(features_grads.stack(), ops.shape(features_NXD)),
        kernel_grad_VD,
    )
