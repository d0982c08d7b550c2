"""Keras models."""

from moe_tf.models.gnmt import Gnmt as Gnmt
from moe_tf.models.language_model import LanguageModel as LanguageModel
from moe_tf.models.next_word_scorer import NextWordScorer as NextWordScorer
from moe_tf.models.transformer import Transformer as Transformer
from moe_tf.models.translation_scorer import (
    TranslationScorer as TranslationScorer,
)
