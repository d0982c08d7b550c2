"""The output layer: a softmax over the vocabulary, sampled in training.

Letters: `J` drawn classes.
"""

import math

import keras
from keras import ops

from moe_tf import checks
from moe_tf.layers.softmax import embedding_rows
from moe_tf.layers.softmax import full
from moe_tf.layers.softmax import token_chunks
from moe_tf.types import Tensor


def log_uniform_ids(uniform_J: Tensor, vocabulary_size: int) -> Tensor:
    """Draws classes with `p(c) = log((c + 2) / (c + 1)) / log(V + 1)`.

    This is close to the frequency of words if ids are sorted by falling
    frequency.

    Args:
        uniform_J: float64, uniform in [0, 1). Float32 is too coarse: with its
            steps of 2^-23 some classes above 600,000 are never drawn.
        vocabulary_size: int, `V`.

    Returns:
        Int32 `(J,)` in [0, V).
    """
    ids_J = ops.floor(ops.exp(uniform_J * math.log(vocabulary_size + 1))) - 1
    # A uniform number close to 1 would round to V.
    return ops.minimum(ops.cast(ids_J, "int32"), vocabulary_size - 1)


def log_inclusion(
    ids: Tensor, vocabulary_size: int, num_sampled: int
) -> Tensor:
    """Computes the log of the probability that a class is drawn at all.

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


def sampled_nll(
    sampled_TJ: Tensor, target_T: Tensor, excluded_TJ: Tensor
) -> Tensor:
    """Computes the negative log-likelihood of targets among drawn classes.

    Args:
        sampled_TJ: float, logits of the drawn classes, minus `log Q`.
        target_T: float, logits of the targets, minus `log Q`.
        excluded_TJ: bool, `True` for the token's own target and for repeated
            draws of a class.

    Returns:
        Float `(T,)`, not below 0.
    """
    others_TJ = ops.where(excluded_TJ, -math.inf, sampled_TJ)
    all_TJ = ops.concatenate([target_T[:, None], others_TJ], axis=1)
    return ops.logsumexp(all_TJ, axis=1) - target_T


@keras.saving.register_keras_serializable(package="moe_tf")
class SampledSoftmax(keras.layers.Layer):
    """Negative log-likelihood of words under a softmax without bias.

    In training, with `num_sampled` set, the softmax is taken over the target
    and `num_sampled` classes drawn log-uniformly, the same for all targets
    of a batch. A class drawn several times counts once, and a token's target
    is excluded from the draws for this token. From every logit the log of the
    probability `Q` that the class is drawn is subtracted. On average the
    value is below the true negative log-likelihood, so compare models by the
    value outside training.

    Otherwise, and whenever `num_sampled` is at least the vocabulary, the
    softmax is over all classes; its logits are computed in chunks of tokens,
    64 MiB at a time.

    Ids must be sorted by falling frequency. Id 0, padding by convention, is
    drawn like any other class: as in the full softmax, the model learns not
    to predict it.

    Under a mixed dtype policy the products are in the compute dtype; logits,
    corrections and sums are float32.

    Args:
        vocabulary_size: int, `V`.
        num_sampled: optional int, draws per step. `None` for the full
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

    Example:

    >>> layer = moe_tf.layers.SampledSoftmax(100, num_sampled=10, seed=0)
    >>> features_BLD = np.zeros((2, 3, 8), "float32")
    >>> targets_BL = np.ones((2, 3), "int32")
    >>> nll_BL = layer(features_BLD, targets_BL)
    >>> print(f"{float(nll_BL[0, 0]):.3f}")  # log(100)
    4.605
    """

    def __init__(
        self,
        vocabulary_size: int,
        num_sampled: int | None = None,
        seed: int | None = None,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        checks.at_least("vocabulary_size", vocabulary_size, 1)
        checks.at_least("num_sampled", num_sampled, 1, allow_none=True)
        self.vocabulary_size = vocabulary_size
        self.num_sampled = num_sampled
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    def build(self, input_shape):
        # No autocast: only the rows in use are cast, and the gradient of the
        # table is summed in float32.
        self.kernel_VD = self.add_weight(
            shape=(self.vocabulary_size, input_shape[-1]),
            initializer="glorot_uniform",
            autocast=False,
            name="kernel",
        )

    def logits(self, features: Tensor) -> Tensor:
        """Computes the logits of every word, float32 `(..., V)`."""
        return full.logits(features, self.kernel_VD, self.compute_dtype)

    def draw(self) -> Tensor:
        """Draws sorted ids, int32 `(num_sampled,)`, and advances the seed."""
        # Integers, unlike floats, are equal with and without XLA.
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
        else:
            nll_T = full.full_nll(x_TD, self.kernel_VD, targets_T)
        return ops.reshape(nll_T, ops.shape(targets))

    def compute_output_spec(self, inputs, targets, training=False):
        return keras.KerasTensor(
            targets.shape, dtype=token_chunks.logits_dtype(self.compute_dtype)
        )

    def get_config(self):
        own = ("vocabulary_size", "num_sampled", "seed")
        return {
            **super().get_config(),
            **{name: getattr(self, name) for name in own},
        }

    def _sampled(self, x_TD, targets_T):
        # int64: see `embedding_rows.replicate_ids`.
        ids_J, targets_T = (
            ops.cast(ids, "int64") for ids in (self.draw(), targets_T)
        )
        ids = ops.concatenate(
            [ids_J, embedding_rows.replicate_ids(targets_T)], axis=0
        )
        rows = ops.cast(ops.take(self.kernel_VD, ids, axis=0), x_TD.dtype)
        rows_JD, rows_TD = rows[: self.num_sampled], rows[self.num_sampled :]
        rows_TD = embedding_rows.shard_rows(rows_TD)
        dtype = token_chunks.logits_dtype(self.compute_dtype)
        sampled_TJ = ops.cast(ops.einsum("TD,JD->TJ", x_TD, rows_JD), dtype)
        target_T = ops.sum(ops.cast(x_TD, dtype) * ops.cast(rows_TD, dtype), -1)
        log_q = ops.cast(
            log_inclusion(ids, self.vocabulary_size, self.num_sampled), dtype
        )
        before_J = ops.pad(ids_J[:-1], [[1, 0]], constant_values=-1)
        return sampled_nll(
            sampled_TJ - log_q[: self.num_sampled],
            target_T - log_q[self.num_sampled :],
            excluded_TJ=(ids_J == before_J)[None, :]
            | (ids_J == targets_T[:, None]),
        )
