"""A softmax layer whose kernel is also the embedding of a model."""

import keras
from keras import ops

from moe_tf import checks
from moe_tf.layers.softmax import embedding_rows
from moe_tf.layers.softmax import full
from moe_tf.layers.softmax import token_chunks
from moe_tf.types import Tensor


@keras.saving.register_keras_serializable(package="moe_tf")
class WordSoftmax(keras.layers.Layer):
    """A softmax over the vocabulary, without bias, tied to the embedding.

    `losses_per_word` also computes the mean over classes of `-log p`, the loss
    of label smoothing, at the cost of one vector: the mean equals
    `log sum_c exp(x W_c) - x mean_c(W_c)`. Logits of more than 256 MiB are
    computed there in chunks and never exist all at once.

    Under a mixed dtype policy the products are in the compute dtype; logits,
    sums and losses are float32.

    Args:
        vocabulary_size: int, `V`.
        kernel_initializer: initializer of the table, float `(V, D)`.
            Defaults to `"glorot_uniform"`.

    Call arguments:
        inputs: float `(..., D)`.

    Returns:
        Logits, float32 `(..., V)`.

    Raises:
        ValueError: if `vocabulary_size` is below 1.

    Example:

    >>> layer = moe_tf.layers.WordSoftmax(vocabulary_size=100)
    >>> layer.build((None, None, 8))
    >>> embedded_BLD = layer.embed(np.ones((2, 3), "int32"))
    >>> tuple(layer(embedded_BLD).shape)
    (2, 3, 100)
    """

    def __init__(
        self,
        vocabulary_size: int,
        kernel_initializer: str
        | keras.initializers.Initializer = "glorot_uniform",
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        checks.at_least("vocabulary_size", vocabulary_size, 1)
        self.vocabulary_size = vocabulary_size
        self.kernel_initializer = keras.initializers.get(kernel_initializer)

    def build(self, input_shape):
        # No autocast, so that the gradient is summed in float32.
        self.kernel_VD = self.add_weight(
            shape=(self.vocabulary_size, input_shape[-1]),
            initializer=self.kernel_initializer,
            autocast=False,
            name="kernel",
        )

    def call(self, inputs):
        return self.logits(inputs)

    def logits(self, features: Tensor) -> Tensor:
        """Computes the logits of every word, float32 `(..., V)`."""
        return full.logits(features, self.kernel_VD, self.compute_dtype)

    def embed(self, tokens: Tensor) -> Tensor:
        """Looks up rows of the table: int `(...)` to float `(..., D)`."""
        rows = ops.take(
            self.kernel_VD, embedding_rows.replicate_ids(tokens), axis=0
        )
        return embedding_rows.shard_rows(ops.cast(rows, self.compute_dtype))

    def losses_per_word(
        self, features: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Computes the losses of training, one per word.

        Args:
            features: float `(..., D)`.
            targets: int `(...)`, in [0, V).

        Returns:
            Two of float32 `(...)` in nats: the negative log-likelihood of
            each target, and the mean negative log-likelihood of all classes.
        """
        dtype = token_chunks.logits_dtype(self.compute_dtype)
        x_TD = ops.reshape(features, (-1, features.shape[-1]))
        x_TD = ops.cast(x_TD, self.compute_dtype)
        targets_T = ops.reshape(ops.cast(targets, "int32"), (-1,))
        nll_T, target_T = full.nll_and_target(x_TD, self.kernel_VD, targets_T)
        mean_D = ops.cast(ops.mean(self.kernel_VD, axis=0), dtype)
        mean_T = ops.einsum("TD,D->T", ops.cast(x_TD, dtype), mean_D)
        shape = ops.shape(targets)
        uniform_T = nll_T + target_T - mean_T
        return ops.reshape(nll_T, shape), ops.reshape(uniform_T, shape)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.vocabulary_size)

    def compute_output_spec(self, inputs):
        return keras.KerasTensor(
            self.compute_output_shape(inputs.shape),
            dtype=token_chunks.logits_dtype(self.compute_dtype),
        )

    def get_config(self):
        return {
            **super().get_config(),
            "vocabulary_size": self.vocabulary_size,
            "kernel_initializer": keras.initializers.serialize(
                self.kernel_initializer
            ),
        }
