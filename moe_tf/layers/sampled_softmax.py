"""The output layer: a softmax over the vocabulary, sampled in training.

Letters: `J` drawn classes, `X` tokens of one chunk, `N` chunks.
"""

import math

import keras
import tensorflow as tf
from keras import ops

from moe_tf import checks
from moe_tf import sharding
from moe_tf.layers import mesh_rows
from moe_tf.layers import vocabulary_chunks

_CHUNK_BYTES = 64 * 2**20


def log_uniform_ids(uniform_J, vocabulary_size):
    """Classes with `p(c) = log((c + 2) / (c + 1)) / log(V + 1)`.

    Close to how often words occur when ids are sorted by falling frequency.

    Args:
        uniform_J: float64, uniform in [0, 1). Float32 is too coarse: its
            steps of 2^-23 leave some classes above 600,000 without a draw.
        vocabulary_size: int, `V`.

    Returns:
        Int32 `(J,)` in [0, V).
    """
    ids_J = ops.floor(ops.exp(uniform_J * math.log(vocabulary_size + 1))) - 1
    # A draw within rounding of 1 would give V.
    return ops.minimum(ops.cast(ids_J, "int32"), vocabulary_size - 1)


def log_inclusion(ids, vocabulary_size, num_sampled):
    """Log of the probability that a class is drawn at least once.

    `Q_c = 1 - (1 - p_c)^num_sampled` for independent draws.

    Args:
        ids: int, any shape.
        vocabulary_size: int, `V`.
        num_sampled: int, draws.

    Returns:
        Float32 of the shape of `ids`.
    """
    ids = ops.cast(ids, "float32")
    p = ops.log1p(1.0 / (ids + 1.0)) / math.log(vocabulary_size + 1)
    return ops.log(-ops.expm1(num_sampled * ops.log1p(-p)))


def sampled_nll(sampled_TJ, target_T, hidden_TJ):
    """Negative log-likelihood of the target among the classes drawn.

    Args:
        sampled_TJ: float, logits of the drawn classes, less `log Q`.
        target_T: float, logits of the targets, less `log Q`.
        hidden_TJ: bool, draws that do not count: the token's own target and
            repeated draws of one class.

    Returns:
        Float `(T,)`, not below 0.
    """
    others_TJ = ops.where(hidden_TJ, -math.inf, sampled_TJ)
    all_TJ = ops.concatenate([target_T[:, None], others_TJ], axis=1)
    return ops.logsumexp(all_TJ, axis=1) - target_T


def full_nll(features_TD, kernel_VD, targets_T, chunk_bytes=_CHUNK_BYTES):
    """Negative log-likelihood under the whole softmax, chunk by chunk.

    At most about `chunk_bytes` of logits exist at a time, in the gradient
    too, which computes them a second time and has no gradient of its own.
    Products have the dtype of the features; sums are float32 or wider.

    Args:
        features_TD: float.
        kernel_VD: float.
        targets_T: int.
        chunk_bytes: int.

    Returns:
        Float32 `(T,)`; float64 for float64 features.
    """
    most = max(1, chunk_bytes // (4 * kernel_VD.shape[0]))
    targets_NX = _chunks(targets_T, most)

    @tf.custom_gradient
    def nll(features_NXD, kernel_VD):
        weights_VD = ops.cast(kernel_VD, features_NXD.dtype)
        log_sum_NX, target_NX = _forward(features_NXD, weights_VD, targets_NX)

        def gradient(upstream_NX):
            features_grad_NXD, kernel_grad_VD = _backward(
                features_NXD, weights_VD, targets_NX, log_sum_NX, upstream_NX
            )
            return features_grad_NXD, ops.cast(kernel_grad_VD, kernel_VD.dtype)

        return log_sum_NX - target_NX, gradient

    # A variable would be an input that `custom_gradient` wants to hear of.
    nll_NX = nll(_chunks(features_TD, most), tf.convert_to_tensor(kernel_VD))
    return ops.reshape(nll_NX, (-1,))[: ops.shape(targets_T)[0]]


def _chunks(x_T, most):
    """Splits the first axis into equal chunks of `most` at the most."""
    total = ops.shape(x_T)[0]
    num_chunks = ops.maximum(1, (total + most - 1) // most)
    size = (total + num_chunks - 1) // num_chunks
    missing = num_chunks * size - total
    zeros = ops.zeros((missing, *x_T.shape[1:]), dtype=x_T.dtype)
    padded = ops.concatenate([x_T, zeros], axis=0)
    return ops.reshape(padded, (num_chunks, size, *x_T.shape[1:]))


def _wide(dtype):
    return keras.backend.result_type(dtype, "float32")


def _logits(features_XD, weights_VD):
    logits_XV = ops.einsum("XD,VD->XV", features_XD, weights_VD)
    return ops.cast(logits_XV, _wide(weights_VD.dtype))


def _forward(features_NXD, weights_VD, targets_NX):
    """Log-partition and target logit of every token."""
    wide = _wide(weights_VD.dtype)

    def one_chunk(chunk):
        features_XD, targets_X = chunk
        logits_XV = _logits(features_XD, weights_VD)
        target_X1 = ops.take_along_axis(logits_XV, targets_X[:, None], axis=1)
        return ops.logsumexp(logits_XV, axis=1), target_X1[:, 0]

    return tf.map_fn(
        one_chunk,
        (features_NXD, targets_NX),
        fn_output_signature=(wide, wide),
        parallel_iterations=1,
    )


def _backward(features_NXD, weights_VD, targets_NX, log_sum_NX, upstream_NX):
    """Gradients of the features and, summed over tokens, of the kernel."""
    dtype, wide = weights_VD.dtype, _wide(weights_VD.dtype)
    vocabulary_size = weights_VD.shape[0]
    num_chunks = tf.shape(features_NXD)[0]

    def add_chunk(index, kernel_grad_VD, features_grads):
        features_XD = features_NXD[index]
        logits_XV = _logits(features_XD, weights_VD)
        error_XV = ops.exp(logits_XV - log_sum_NX[index][:, None])
        error_XV -= ops.one_hot(targets_NX[index], vocabulary_size, dtype=wide)
        error_XV = ops.cast(error_XV * upstream_NX[index][:, None], dtype)
        kernel_grad_VD += ops.cast(
            ops.einsum("XV,XD->VD", error_XV, features_XD), wide
        )
        features_grad_XD = ops.einsum("XV,VD->XD", error_XV, weights_VD)
        features_grads = features_grads.write(index, features_grad_XD)
        return index + 1, kernel_grad_VD, features_grads

    _, kernel_grad_VD, features_grads = tf.while_loop(
        lambda index, *_: index < num_chunks,
        add_chunk,
        (
            0,
            ops.zeros(weights_VD.shape, dtype=wide),
            tf.TensorArray(dtype, size=num_chunks),
        ),
        parallel_iterations=1,
    )
    return (
        ops.reshape(features_grads.stack(), ops.shape(features_NXD)),
        kernel_grad_VD,
    )


@keras.saving.register_keras_serializable(package="moe_tf")
class SampledSoftmax(keras.layers.Layer):
    """Negative log-likelihood of words under a softmax without bias.

    In training, with `num_sampled` set, the softmax is taken over the target
    and `num_sampled` classes drawn log-uniformly, the same for all targets
    of a batch. A class drawn several times counts once, a class that is a
    token's target is left out of that token's draws, and from every logit
    the log of its probability `Q` to be among the draws is subtracted. On
    average the value is below the true negative log-likelihood, so compare
    models by the value outside training.

    Otherwise, and whenever `num_sampled` is at least the vocabulary, the
    softmax is whole; its logits are computed in chunks of tokens, 64 MiB at
    a time.

    Ids must be sorted by falling frequency. Id 0, padding by convention, is
    among the draws too: as in the whole softmax, it is a class like any
    other, which the model learns not to predict.

    Under a mixed dtype policy the products are in the compute dtype; logits,
    corrections and sums are float32.

    Args:
        vocabulary_size: int, `V`.
        num_sampled: optional int, draws per step. `None` for the whole
            softmax in training too.
        seed: optional int for the draws.

    Call arguments:
        inputs: float `(..., D)`.
        targets: int `(...)`, in [0, V).
        training: bool.

    Returns:
        Float32 `(...)`, in nats.

    Raises:
        ValueError: if a size is below 1.

    Reference:
     - [Jozefowicz et al., 2016](https://arxiv.org/abs/1602.02410)
     - [Jean et al., 2015](https://arxiv.org/abs/1412.2007)
    """

    def __init__(self, vocabulary_size, num_sampled=None, seed=None, **kwargs):
        super().__init__(**kwargs)
        checks.at_least("vocabulary_size", vocabulary_size, 1)
        checks.at_least("num_sampled", num_sampled, 1, none_is_fine=True)
        self.vocabulary_size = vocabulary_size
        self.num_sampled = num_sampled
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    def build(self, input_shape):
        # Not cast on reading: a cast of the rows in use is enough, and the
        # gradient of the whole table is summed in float32.
        self.kernel_VD = self.add_weight(
            shape=(self.vocabulary_size, input_shape[-1]),
            initializer="glorot_uniform",
            autocast=False,
            name="kernel",
        )

    def logits(self, features):
        """Logits of every word: `(..., D)` to float32 `(..., V)`."""
        features = ops.cast(features, self.compute_dtype)
        kernel_VD = ops.cast(self.kernel_VD, self.compute_dtype)
        leading = "ABLNT"[: len(features.shape) - 1]  # DTensor lacks "..."
        logits = ops.einsum(f"{leading}D,VD->{leading}V", features, kernel_VD)
        return ops.cast(logits, _wide(self.compute_dtype))

    def draw(self):
        """Draws ids, int32 `(num_sampled,)`, sorted; advances the seed."""
        # Integers, unlike floats, are drawn alike with XLA and without.
        integers_J = keras.random.randint(
            (self.num_sampled,), 0, 2**53, "int64", seed=self.seed_generator
        )
        uniform_J = ops.cast(integers_J, "float64") / 2**53
        return ops.sort(log_uniform_ids(uniform_J, self.vocabulary_size))

    def call(self, inputs, targets, training=False):
        x_TD = ops.reshape(inputs, (-1, inputs.shape[-1]))
        targets_T = ops.reshape(ops.cast(targets, "int32"), (-1,))
        sampled = (
            self.num_sampled is not None
            and self.num_sampled < self.vocabulary_size
        )
        if training and sampled:
            nll_T = self._sampled(x_TD, targets_T)
        elif sharding.axes() is not None:
            nll_T = vocabulary_chunks.full_nll(x_TD, self.kernel_VD, targets_T)
        else:
            nll_T = full_nll(x_TD, self.kernel_VD, targets_T)
        return ops.reshape(nll_T, ops.shape(targets))

    def compute_output_spec(self, inputs, targets, training=False):
        return keras.KerasTensor(targets.shape, dtype=_wide(self.compute_dtype))

    def get_config(self):
        own = ("vocabulary_size", "num_sampled", "seed")
        return {
            **super().get_config(),
            **{name: getattr(self, name) for name in own},
        }

    def _sampled(self, x_TD, targets_T):
        ids_J = self.draw()
        all_T = sharding.constrain(targets_T, None)
        ids = ops.concatenate([ids_J, all_T], axis=0)
        rows = ops.cast(ops.take(self.kernel_VD, ids, axis=0), x_TD.dtype)
        rows_JD, rows_TD = rows[: self.num_sampled], rows[self.num_sampled :]
        rows_TD = mesh_rows.share(rows_TD)
        wide = _wide(self.compute_dtype)
        sampled_TJ = ops.cast(ops.einsum("TD,JD->TJ", x_TD, rows_JD), wide)
        target_T = ops.sum(ops.cast(x_TD, wide) * ops.cast(rows_TD, wide), -1)
        log_q = ops.cast(
            log_inclusion(ids, self.vocabulary_size, self.num_sampled), wide
        )
        before_J = ops.pad(ids_J[:-1], [[1, 0]], constant_values=-1)
        return sampled_nll(
            sampled_TJ - log_q[: self.num_sampled],
            target_T - log_q[self.num_sampled :],
            (ids_J == before_J)[None, :] | (ids_J == targets_T[:, None]),
        )
