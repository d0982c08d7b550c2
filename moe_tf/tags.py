"""Every TensorBoard tag. Their number does not grow with the experts."""

LOSS = "loss/total"
PERPLEXITY = "loss/perplexity"
LEARNING_RATE = "train/learning_rate"
WORDS_PER_SECOND = "train/words_per_second"

# The layer with the most uneven load, over all layers of the model.
WORST_MAX_OVER_MEAN_LOAD = "balance/worst_max_over_mean_load"


def balance(layer, statistic):
    """Tag of one of `metrics.BALANCE_STATISTICS` of a layer."""
    return f"balance_{layer}/{statistic}"


def load_per_expert(layer):
    """Histogram over the experts of load / mean load; 1 is balance."""
    return f"balance_{layer}/load_over_mean"


def bleu(pair):
    """BLEU of greedy translations of validation text of a pair."""
    return f"translation_{pair}/bleu"


def chrf(pair):
    """chrF of the same."""
    return f"translation_{pair}/chrf"


def signature(pair):
    """How sacrebleu computed them, as text."""
    return f"translation_{pair}/bleu_signature"


def translations(pair):
    """Some sources, translations and references, as text."""
    return f"translation_{pair}/examples"
