"""What `fit` minimises when a language model trains."""

import keras
from keras import ops

from moe_tf import sharding
from moe_tf.metrics import Perplexity
from moe_tf.metrics import WordCount


@keras.saving.register_keras_serializable(package="moe_tf")
class MeanOverWords(keras.losses.Loss):
    """Mean of predictions that are losses already, weighted by word.

    `y_true` is not looked at. With `sample_weight` 1 for words and 0 for
    padding it is the mean over the words of the batch, 0 if there are none.
    """

    def __init__(
        self,
        name="mean_over_words",
        reduction="mean_with_sample_weight",
        dtype=None,
    ):
        super().__init__(name=name, reduction=reduction, dtype=dtype)

    def call(self, y_true, y_pred):
        return y_pred


@keras.saving.register_keras_serializable(package="moe_tf")
class NextWordScorer(keras.Model):
    """Scores given next words, without all logits standing in memory.

    In training with the language model's `num_sampled`, the score is the
    importance-sampled one; its perplexity is then below the true one,
    which `evaluate` gives.

        scorer = NextWordScorer(LanguageModel("MoE-32", 10_000))
        scorer.compile_for_words(keras.optimizers.Adam(1e-3))
        scorer.fit(x={"tokens": ..., "targets": ...}, y=targets,
                   sample_weight=weights)

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

    def __init__(self, language_model, **kwargs):
        super().__init__(**kwargs)
        self.language_model = language_model

    def build(self, input_shape=None):
        if not self.language_model.built:
            self.language_model.build()
        self.built = True

    def call(self, inputs, training=False):
        model, targets = self.language_model, inputs["targets"]
        if sharding.axes() is not None and None in targets.shape:
            # Keras asks what comes out before there is data. Programs on a
            # mesh are of sizes that are known.
            spec = model.softmax.compute_output_spec(None, targets)
            return ops.zeros(ops.shape(targets), spec.dtype)
        features_BLD = model.features(inputs["tokens"], training=training)
        return model.softmax(features_BLD, targets, training=training)

    def compile_for_words(self, optimizer, **kwargs):
        """`compile` with the mean over words as loss, and its metrics.

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
