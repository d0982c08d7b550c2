"""Keras models."""

from moe_tf.models.language.model import LanguageModel as LanguageModel
from moe_tf.models.language.scorer import NextWordScorer as NextWordScorer
from moe_tf.models.translation.gnmt import Gnmt as Gnmt
from moe_tf.models.translation.scorer import (
    TranslationScorer as TranslationScorer,
)
from moe_tf.models.translation.transformer import Transformer as Transformer
