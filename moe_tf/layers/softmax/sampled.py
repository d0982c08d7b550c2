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
        return full.logits(features, self.kernel_VD, self.compute_dtype)

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
        ids_J, targets_T = (  # see `embedding_rows.replicate_ids`
            ops.cast(ids, "int64") for ids in (self.draw(), targets_T)
        )
        ids = ops.concatenate(
            [ids_J, embedding_rows.replicate_ids(targets_T)], axis=0
        )
        rows = ops.cast(ops.take(self.kernel_VD, ids, axis=0), x_TD.dtype)
        rows_JD, rows_TD = rows[: self.num_sampled], rows[self.num_sampled :]
        rows_TD = embedding_rows.shard_rows(rows_TD)
        wide = token_chunks.logits_dtype(self.compute_dtype)
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
