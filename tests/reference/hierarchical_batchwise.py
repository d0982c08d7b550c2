"""Appendices B and F together in plain numpy, one group at a time."""

import numpy as np

from tests.reference import batchwise


def route(x_TD, gates, thresholds, k, training, mask_T=None):
    """Who is chosen, with which weights.

    Args:
        x_TD: inputs.
        gates: kernels `(D, P)` and `(P, D, Q)`.
        thresholds: `(P,)` and `(P, Q)`.
        k: at each level.
        training: whether the batch chooses, or the thresholds.
        mask_T: optional bool.

    Returns:
        `(gate_TPQ, chosen_TPQ, loss, excess)`: `loss` is equation 20 at both
        levels, `excess` how many more tokens pass each threshold than the
        batch gives, `(P,)` and `(P, Q)`; both of training alone.
    """
    num_groups, _, group_size = gates[1].shape
    real_T = np.ones(len(x_TD), bool) if mask_T is None else mask_T
    weight_TP, chosen_TP, loss, excess_P = level(
        batchwise.scores(x_TD, gates[0]), thresholds[0], k, training, real_T
    )
    gate_TPQ = np.zeros((len(x_TD), num_groups, group_size))
    chosen_TPQ = np.zeros(gate_TPQ.shape, bool)
    excess_PQ = np.zeros((num_groups, group_size))
    for i in range(num_groups):
        own = np.flatnonzero(chosen_TP[:, i])
        score_OQ = batchwise.scores(x_TD[own], gates[1][i])
        score_OQ = score_OQ.reshape(len(own), group_size)
        weight_OQ, chosen_TPQ[own, i], one_loss, excess_PQ[i] = level(
            score_OQ, thresholds[1][i], k, training, np.ones(len(own), bool)
        )
        gate_TPQ[own, i] = weight_TP[own, i, None] * weight_OQ
        loss += one_loss
    return gate_TPQ, chosen_TPQ, loss, (excess_P, excess_PQ)


def level(score_TE, threshold_E, k, training, real_T):
    """One gate of appendix F over the tokens that come to it."""
    passes_TE = batchwise.threshold_mask(score_TE, threshold_E, real_T)
    chosen_TE, loss = passes_TE, 0.0
    if training:
        m = batchwise.tokens_an_expert(real_T.sum(), k, len(threshold_E))
        chosen_TE = batchwise.batchwise_mask(score_TE, m, real_T)
        loss = batchwise.batchwise_loss(score_TE, threshold_E, m, real_T)
    return (
        batchwise.renormalised(score_TE, chosen_TE),
        chosen_TE,
        loss,
        passes_TE.sum(0) - chosen_TE.sum(0),
    )
