"""The model that `fit` trains for a language model, and its loss."""

import keras
from keras import ops

from moe_tf import sharding
from moe_tf.metrics import Perplexity
from moe_tf.metrics import WordCount
from moe_tf.models.language.model import LanguageModel


@keras.saving.register_keras_serializable(package="moe_tf")
class MeanOverWords(keras.losses.Loss):
    """Mean over words of a scorer's predictions, which are losses already.

    `y_true` is ignored. With `sample_weight` 1 for words and 0 for padding
    the loss is the mean over the words of the batch, 0 if there are none.
    """

    def __init__(
        self,
        name: str = "mean_over_words",
        reduction: str = "mean_with_sample_weight",
        dtype: str | None = None,
    ):
        super().__init__(name=name, reduction=reduction, dtype=dtype)

    def call(self, y_true, y_pred):
        return y_pred


@keras.saving.register_keras_serializable(package="moe_tf")
class NextWordScorer(keras.Model):
    """Scores given next words without keeping all logits in memory.

    If the language model has `num_sampled`, the score in training is the
    importance-sampled one. The perplexity in training is then below the true
    perplexity, which `evaluate` gives.

    Example:

    >>> model = moe_tf.models.LanguageModel(
    ...     "MoE-4", 50, width=8, moe={"k": 2}
    ... )
    >>> scorer = moe_tf.models.NextWordScorer(model)
    >>> scorer.compile_for_words(keras.optimizers.Adam(1e-3))
    >>> tokens = np.array([[2, 17, 5], [2, 44, 0]])
    >>> targets = np.array([[17, 5, 3], [44, 3, 0]])
    >>> history = scorer.fit(
    ...     {"tokens": tokens, "targets": targets}, targets,
    ...     sample_weight=(targets != 0).astype("float32"), verbose=0,
    ... )
    >>> history.history["words"]
    [5.0]

    Args:
        language_model: `LanguageModel`, shared, not copied.

    Call arguments:
        inputs: dict of `tokens`, int `(B, L)`, and `targets`, int `(B, L)`,
            the word after each token.
        training: bool.

    Returns:
        Negative log-likelihood of each target in nats, float32 `(B, L)`,
        padding included.
    """

    def __init__(self, language_model: LanguageModel, **kwargs):
        super().__init__(**kwargs)
        self.language_model = language_model

    def build(self, input_shape=None):
        if not self.language_model.built:
            self.language_model.build()
        self.built = True

    def call(self, inputs, training=False):
        model, targets = self.language_model, inputs["targets"]
        if sharding.axes() is not None and None in targets.shape:
            # Keras asks for the output's shape before there is data. Programs
            # on a mesh have known sizes.
            spec = model.softmax.compute_output_spec(None, targets)
            return ops.zeros(ops.shape(targets), spec.dtype)
        features_BLD = model.features(inputs["tokens"], training=training)
        return model.softmax(features_BLD, targets, training=training)

    def compile_for_words(
        self, optimizer: keras.optimizers.Optimizer, **kwargs
    ) -> None:
        """Compiles with the mean over words as loss, and its metrics.

        Data is `({"tokens", "targets"}, targets, weights)`, each `(B, L)`;
        weights are 1 for words and 0 for padding.
        """
        self.compile(
            optimizer,
            loss=MeanOverWords(),
            weighted_metrics=[Perplexity(), WordCount()],
            **kwargs,
        )

    def get_config(self):
        return {
            **super().get_config(),
            "language_model": keras.saving.serialize_keras_object(
                self.language_model
            ),
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        config["language_model"] = keras.saving.deserialize_keras_object(
            config["language_model"], custom_objects=custom_objects
        )
        return cls(**config)
