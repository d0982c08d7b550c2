"""Appendix F and expert choice in plain numpy, one entry at a time."""

import math

import numpy as np

from tests.reference import moe


def scores(x_TD, gate_DE):
    """Equation 15."""
    return np.array([moe.softmax(x_D @ gate_DE) for x_D in x_TD])


def tokens_an_expert(num_tokens, k, num_experts):
    """`m = k |X| / n` of equation 18, rounded up."""
    return math.ceil(k * num_tokens / num_experts)


def batchwise_mask(score_TE, m, mask_T=None):
    """Equation 18; of equal scores the earlier token is taken."""
    chosen_TE = np.zeros(score_TE.shape, bool)
    for i, score_T in enumerate(score_TE.T):
        order = sorted(range(len(score_T)), key=lambda j: (-score_T[j], j))
        real = [j for j in order if mask_T is None or mask_T[j]]
        chosen_TE[real[:m], i] = True
    return chosen_TE


def threshold_mask(score_TE, threshold_E, mask_T=None):
    """Equation 19."""
    chosen_TE = np.zeros(score_TE.shape, bool)
    for j, i in np.ndindex(*score_TE.shape):
        real = mask_T is None or mask_T[j]
        chosen_TE[j, i] = real and score_TE[j, i] > threshold_E[i]
    return chosen_TE


def renormalised(score_TE, chosen_TE):
    """Equation 16; zeros for a token without an expert."""
    gate_TE = np.zeros_like(score_TE)
    for j, (score_E, chosen_E) in enumerate(
        zip(score_TE, chosen_TE, strict=True)
    ):
        if chosen_E.any():
            gate_TE[j] = score_E * chosen_E / score_E[chosen_E].sum()
    return gate_TE


def batchwise_loss(score_TE, threshold_E, m, mask_T=None):
    """Equation 20, summed entry by entry over the real tokens."""
    by_batch_TE = batchwise_mask(score_TE, m, mask_T)
    passes_TE = threshold_mask(score_TE, threshold_E, mask_T)
    total = 0.0
    for j, i in np.ndindex(*score_TE.shape):
        wrong = float(passes_TE[j, i]) - float(by_batch_TE[j, i])
        total += wrong * (score_TE[j, i] - threshold_E[i])
    return total


def mixture(x_TD, gate_TE, in_EDF, out_EFD):
    """Equation 1: every expert with a gate other than zero, token by token."""
    y_TD = np.zeros_like(x_TD)
    for t, i in zip(*np.nonzero(gate_TE), strict=True):
        answer_D = moe.expert(x_TD[t], in_EDF[i], out_EFD[i])
        y_TD[t] += gate_TE[t, i] * answer_D
    return y_TD
