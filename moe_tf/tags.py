"""TensorBoard tags. Their number does not depend on the number of experts."""

LOSS = "loss/total"
PERPLEXITY = "loss/perplexity"
LEARNING_RATE = "train/learning_rate"
WORDS_PER_SECOND = "train/words_per_second"

# The layer with the most uneven load, over all layers of the model.
WORST_MAX_OVER_MEAN_LOAD = "balance/worst_max_over_mean_load"


def balance(layer: str, statistic: str) -> str:
    """Returns the tag of one of `metrics.BALANCE_STATISTICS` of a layer."""
    return f"balance_{layer}/{statistic}"


def load_per_expert(layer: str) -> str:
    """Returns the tag of a layer's histogram of load / mean load."""
    return f"balance_{layer}/load_over_mean"


def bleu(pair: str) -> str:
    """Returns the tag of BLEU on the validation text of a language pair."""
    return f"translation_{pair}/bleu"


def chrf(pair: str) -> str:
    """Returns the tag of chrF on the validation text of a language pair."""
    return f"translation_{pair}/chrf"


def signature(pair: str) -> str:
    """Returns the tag of sacrebleu's signature of both scores, as text."""
    return f"translation_{pair}/bleu_signature"


def translations(pair: str) -> str:
    """Returns the tag of some sources, translations and references, as text."""
    return f"translation_{pair}/examples"
