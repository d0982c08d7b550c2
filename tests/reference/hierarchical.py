"""Appendix B in plain numpy, one token at a time, in float64."""

import numpy as np

from tests.reference import moe


def noisy_logits(x_D, gate_DE, noise_DE, draw_E):
    """Logits before and after the noise, and its deviation (None: no noise)."""
    clean_E = x_D @ gate_DE
    if draw_E is None:
        return clean_E, clean_E, None
    std_E = moe.softplus(x_D @ noise_DE)
    return clean_E, clean_E + draw_E * std_E, std_E


def route(x_TD, primary, secondary, k, draws=None, mask_T=None):
    """Equations 12 (the gates), 13 and 14.

    Args:
        x_TD: inputs.
        primary: gate and noise kernel, `(D, P)` each.
        secondary: gate and noise kernels, `(P, D, Q)` each.
        k: kept at each level.
        draws: `(T, P)` and `(T, K, Q)` normal draws, the latter in the order
            in which a token chose its groups, best first; `None`: no noise.
        mask_T: optional bool.

    Returns:
        `(gate_TPQ, importance_PQ, load_PQ)`.
    """
    num_groups, _, group_size = secondary[0].shape
    gate_TPQ = np.zeros((len(x_TD), num_groups, group_size))
    load_primary_P, number_P = np.zeros(num_groups), np.zeros(num_groups)
    load_secondary_PQ = np.zeros((num_groups, group_size))
    for t, x_D in enumerate(x_TD):
        if mask_T is not None and not mask_T[t]:
            continue
        draw_P, draw_KQ = (None, [None] * k) if draws is None else (
            draws[0][t],
            draws[1][t],
        )  # fmt: skip
        logits = noisy_logits(x_D, *primary, draw_P)
        gate_P = moe.gates_of_token(logits[1], k)
        load_primary_P += load(gate_P, *logits, k)
        chosen = np.argsort(-logits[1], kind="stable")[:k]
        for i, draw_Q in zip(chosen, draw_KQ, strict=True):
            logits = noisy_logits(x_D, secondary[0][i], secondary[1][i], draw_Q)
            gate_Q = moe.gates_of_token(logits[1], k)
            gate_TPQ[t, i] = gate_P[i] * gate_Q
            load_secondary_PQ[i] += load(gate_Q, *logits, k)
            number_P[i] += 1
    load_PQ = (
        load_primary_P[:, None]
        * load_secondary_PQ
        / np.maximum(number_P, 1)[:, None]
    )
    return gate_TPQ, gate_TPQ.sum(0), load_PQ


def load(gate_E, clean_E, noisy_E, std_E, k):
    """Equation 9, or whether an expert is chosen where that is certain."""
    if std_E is None or k == len(clean_E):
        return (gate_E > 0).astype(float)
    return moe.load_of_token(clean_E, noisy_E, std_E, k)
