"""The model that `fit` trains for a translation model, loss and metrics."""

import keras
from keras import ops

from moe_tf import sharding
from moe_tf.metrics import Perplexity
from moe_tf.metrics import WordCount
from moe_tf.models.translation.base import TranslationModel


@keras.saving.register_keras_serializable(package="moe_tf")
class SmoothedMeanOverWords(keras.losses.Loss):
    """Mean over words of `(1 - e) * nll + e * uniform`.

    Predictions hold both losses: `nll`, the negative log-likelihood of the
    word, and `uniform`, the mean of the negative log-likelihoods of all
    classes. `y_true` is ignored. With `sample_weight` 1 for words and 0 for
    padding the loss is the mean over the words of the batch, 0 if there are
    none.

    Args:
        label_smoothing: float in [0, 1), `e`. Defaults to `0.0`.
    """

    def __init__(
        self,
        label_smoothing: float = 0.0,
        name: str = "smoothed_mean_over_words",
        reduction: str = "mean_with_sample_weight",
        dtype: str | None = None,
    ):
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        _check_label_smoothing(label_smoothing)
        self.label_smoothing = label_smoothing

    def call(self, y_true, y_pred):
        nll, uniform = y_pred[..., 0], y_pred[..., 1]
        return nll + self.label_smoothing * (uniform - nll)

    def get_config(self):
        return {
            **super().get_config(),
            "label_smoothing": self.label_smoothing,
        }


def _check_label_smoothing(label_smoothing):
    if not 0 <= label_smoothing < 1:
        raise ValueError(
            "`label_smoothing` must be at least 0 and below 1. "
            f"Received: label_smoothing={label_smoothing}"
        )


@keras.saving.register_keras_serializable(package="moe_tf")
class WordPerplexity(Perplexity):
    """`Perplexity` of the first of a scorer's two predictions."""

    def update_state(self, y_true, y_pred, sample_weight=None):
        super().update_state(y_true, y_pred[..., 0], sample_weight)


@keras.saving.register_keras_serializable(package="moe_tf")
class ScoredWordCount(WordCount):
    """`WordCount` for a scorer, whose predictions are two for each word."""

    def update_state(self, y_true, y_pred, sample_weight=None):
        super().update_state(y_true, y_pred[..., 0], sample_weight)


@keras.saving.register_keras_serializable(package="moe_tf")
class TranslationScorer(keras.Model):
    """Scores given translations without keeping all logits in memory.

    Example:

    >>> model = moe_tf.models.Transformer(
    ...     "Transformer", 50, width=8, num_heads=2, encoder_layers=1,
    ...     decoder_layers=1,
    ... )
    >>> scorer = moe_tf.models.TranslationScorer(model, label_smoothing=0.1)
    >>> scorer.compile_for_words(keras.optimizers.Adam(1e-3))
    >>> source = np.array([[17, 5, 3], [44, 3, 0]])
    >>> tokens = np.array([[2, 21], [2, 0]])
    >>> targets = np.array([[21, 3], [3, 0]])
    >>> history = scorer.fit(
    ...     {"source": source, "tokens": tokens, "targets": targets}, targets,
    ...     sample_weight=(targets != 0).astype("float32"), verbose=0,
    ... )
    >>> history.history["words"]
    [3.0]

    Args:
        translation_model: `Gnmt` or `Transformer`, shared, not copied.
        label_smoothing: float in [0, 1), the fraction of the target's
            probability that all classes get in equal parts, in the losses of
            training and evaluation. The perplexity is without smoothing.
            Defaults to `0.0`.

    Call arguments:
        inputs: dict of `source`, int `(B, S)`, `tokens`, int `(B, L)`, and
            `targets`, int `(B, L)`, the word after each token.
        training: bool.

    Returns:
        Float32 `(B, L, 2)` in nats, padding included: the negative
        log-likelihood of each target, and the mean of the negative
        log-likelihoods of all classes.

    Raises:
        ValueError: if `label_smoothing` is out of range.

    Reference:
     - [Szegedy et al., 2016](https://arxiv.org/abs/1512.00567), section 7
    """

    def __init__(
        self,
        translation_model: TranslationModel,
        label_smoothing: float = 0.0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        _check_label_smoothing(label_smoothing)
        self.translation_model = translation_model
        self.label_smoothing = label_smoothing

    def build(self, input_shape=None):
        if not self.translation_model.built:
            self.translation_model.build()
        self.built = True

    def call(self, inputs, training=False):
        model, targets = self.translation_model, inputs["targets"]
        if sharding.axes() is not None and None in targets.shape:
            # Keras asks for the output's shape before there is data. Programs
            # on a mesh have known sizes.
            spec = model.softmax.compute_output_spec(
                keras.KerasTensor((*targets.shape, model.variant.width))
            )
            return ops.zeros((*ops.shape(targets), 2), spec.dtype)
        features_BLD = model.features(
            {name: inputs[name] for name in ("source", "tokens")},
            training=training,
        )
        losses = model.softmax.losses_per_word(features_BLD, targets)
        return ops.stack(losses, axis=-1)

    def compile_for_words(
        self, optimizer: keras.optimizers.Optimizer, **kwargs
    ) -> None:
        """Compiles with the smoothed mean over words, and its metrics.

        Data is `({"source", "tokens", "targets"}, targets, weights)`, all but
        the source `(B, L)`; weights are 1 for words and 0 for padding.
        """
        self.compile(
            optimizer,
            loss=SmoothedMeanOverWords(self.label_smoothing),
            weighted_metrics=[WordPerplexity(), ScoredWordCount()],
            **kwargs,
        )

    def get_config(self):
        return {
            **super().get_config(),
            "translation_model": keras.saving.serialize_keras_object(
                self.translation_model
            ),
            "label_smoothing": self.label_smoothing,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        config["translation_model"] = keras.saving.deserialize_keras_object(
            config["translation_model"], custom_objects=custom_objects
        )
        return cls(**config)
