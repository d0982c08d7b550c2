"""Decoding over a model's step function: beam search and sampling.

`search_beams` and `sample_hypotheses` translate: they give `Hypotheses` of
each source sentence. `sample_text` writes with a language model.
"""

from moe_tf.decoding.beam_search import search_beams
from moe_tf.decoding.hypotheses import Hypotheses
from moe_tf.decoding.hypotheses import coverage_penalty
from moe_tf.decoding.hypotheses import length_penalty
from moe_tf.decoding.language_model import sample_text
from moe_tf.decoding.sampling import sample_hypotheses

__all__ = [
    "Hypotheses",
    "coverage_penalty",
    "length_penalty",
    "sample_hypotheses",
    "sample_text",
    "search_beams",
]


def __dir__() -> list[str]:
    return __all__
