"""Evaluation: BLEU and chrF of translations, and what each expert is for.

`corpus_scores` scores translations against references. `ExpertWords` collects
the tokens that an expert is chosen for (table 9 of the paper).
"""

from moe_tf.evaluation.bleu import CorpusScores
from moe_tf.evaluation.bleu import corpus_scores
from moe_tf.evaluation.expert_words import ExpertWords
from moe_tf.evaluation.expert_words_report import expert_words_as_html
from moe_tf.evaluation.expert_words_report import expert_words_as_text

__all__ = [
    "CorpusScores",
    "ExpertWords",
    "corpus_scores",
    "expert_words_as_html",
    "expert_words_as_text",
]


def __dir__() -> list[str]:
    return __all__
