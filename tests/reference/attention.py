"""Attention in numpy, one sequence, head and position after another."""

import numpy as np


def softmax(scores):
    scores = np.exp(scores - np.max(scores))
    return scores / scores.sum()


def dot_product(queries_BLD, keys_BSD, values_BSD, num_heads, sees):
    """Vaswani et al., 2017, section 3.2.

    `sees(b, l, s)` says whether a target position sees a source position.
    Returns outputs `(B, L, D)` and weights `(B, H, L, S)`.
    """
    batch, length, width = queries_BLD.shape
    num_sources, size = keys_BSD.shape[1], width // num_heads
    outputs = np.zeros((batch, length, width))
    weights = np.zeros((batch, num_heads, length, num_sources))
    for b, h, t in np.ndindex(batch, num_heads, length):
        part = slice(h * size, (h + 1) * size)
        seen = [s for s in range(num_sources) if sees(b, t, s)]
        scores = keys_BSD[b, seen, part] @ queries_BLD[b, t, part]
        weight = softmax(scores / np.sqrt(size))
        weights[b, h, t, seen] = weight
        outputs[b, t, part] = weight @ values_BSD[b, seen, part]
    return outputs, weights


def additive(query_D, sources_SD, source_DA, query_DA, scale_A, form):
    """Equation 22 (`"product"`) or 21 (`"sum"`), unit after unit.

    Of one target vector and the source vectors that it sees; returns the
    mean of the source vectors by weight, and the weights.
    """
    scores = []
    for source_D in sources_SD:
        score = 0.0
        for d, scale in enumerate(scale_A):
            x = sum(source_D * source_DA[:, d])
            y = sum(query_D * query_DA[:, d])
            if form == "product":
                score += scale * np.tanh(x) * np.tanh(y)
            else:
                score += scale * np.tanh(x + y)
        scores.append(score)
    weight_S = softmax(np.array(scores))
    return weight_S @ sources_SD, weight_S
