"""Keras models: the paper's language and translation models.

`NextWordScorer` and `TranslationScorer` train them with `fit`; `Translator`
translates strings. The settings of their MoE layers are one mapping, `moe`.
"""

from moe_tf.models.language.model import LanguageModel
from moe_tf.models.language.scorer import NextWordScorer
from moe_tf.models.translation.factory import make_translation_model
from moe_tf.models.translation.gnmt import Gnmt
from moe_tf.models.translation.scorer import TranslationScorer
from moe_tf.models.translation.transformer import Transformer
from moe_tf.models.translation.translator import Settings as TranslatorSettings
from moe_tf.models.translation.translator import Translator

__all__ = [
    "Gnmt",
    "LanguageModel",
    "NextWordScorer",
    "Transformer",
    "TranslationScorer",
    "Translator",
    "TranslatorSettings",
    "make_translation_model",
]


def __dir__() -> list[str]:
    return __all__
