"""Keras models."""

from moe_tf.models.language_model import LanguageModel as LanguageModel
from moe_tf.models.next_word_scorer import NextWordScorer as NextWordScorer
