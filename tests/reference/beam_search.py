"""Beam search one hypothesis at a time, exhaustive search, GNMT's score.

`continuations(prefix)` gives the log-probabilities `(V,)` of what follows a
prefix, and the attentions `(len + 1, S)` over a source without padding.
"""

import itertools
import math
import typing

import numpy as np


class Hypothesis(typing.NamedTuple):
    score: float
    tokens: tuple
    log_probability: float
    attention: np.ndarray


def score(log_probability, attention_IS, alpha, beta):
    """Wu et al., equation 14."""
    penalty = (5 + len(attention_IS)) ** alpha / (5 + 1) ** alpha
    total = log_probability / penalty
    if beta:
        for covered in attention_IS.sum(axis=0):
            total += beta * math.log(min(max(covered, 1e-10), 1.0))
    return total


def search(
    continuations,
    end_id,
    beam_size,
    max_length,
    alpha=0.2,
    beta=0.2,
    pruning=3.0,
    num_best=1,
    forbidden_ids=(),
):
    """Does what `search_beams` documents, without stopping early."""
    live, finished = [((), 0.0)], []
    for position in range(max_length):
        offers = []
        for rank, (prefix, value) in enumerate(live):
            log_V, attention = continuations(prefix)
            ids = [end_id]
            if position + 1 < max_length:
                ids = [i for i in range(len(log_V)) if i not in forbidden_ids]
            best = max(log_V[i] for i in ids)
            for i in ids:
                if pruning is None or log_V[i] >= best - pruning:
                    offers.append((value + log_V[i], rank, i, attention))
        offers.sort(key=lambda offer: (-offer[0], offer[1], offer[2]))
        for value, rank, i, attention in offers[:beam_size]:
            if i == end_id:
                tokens = (*live[rank][0], end_id)
                finished.append(
                    Hypothesis(
                        score(value, attention, alpha, beta),
                        tokens,
                        value,
                        attention,
                    )
                )
        if len(finished) >= beam_size:
            break
        others = [offer for offer in offers if offer[2] != end_id]
        live = [
            ((*live[rank][0], i), value)
            for value, rank, i, _ in others[:beam_size]
        ]
    return _best(finished, num_best, pruning)


def exhaustive(continuations, end_id, words, max_length, alpha, beta):
    """All sequences of `words` that end within `max_length`, best first."""
    found = []
    for length in range(max_length):
        for prefix in itertools.product(words, repeat=length):
            tokens = (*prefix, end_id)
            value = 0.0
            for i, token in enumerate(tokens):
                log_V, attention = continuations(prefix[:i])
                value += log_V[token]
            total = score(value, attention, alpha, beta)
            found.append(Hypothesis(total, tokens, value, attention))
    return sorted(found, key=lambda one: -one.score)


def _best(found, num_best, pruning):
    found = sorted(found, key=lambda one: -one.score)
    if pruning is not None and found:
        found = [one for one in found if one.score >= found[0].score - pruning]
    return found[:num_best]
