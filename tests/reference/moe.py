"""The layer of the paper in plain numpy, one token at a time, in float64."""

import math

import numpy as np


def softplus(z):
    return np.logaddexp(0.0, z)


def softmax(v):
    e = np.exp(v - v.max())
    return e / e.sum()


def normal_cdf(z):
    return 0.5 * math.erfc(-z / math.sqrt(2.0))


def cv_squared(v):
    return v.var() / v.mean() ** 2


def gates_of_token(noisy_E, k):
    """Equations 3 and 5: softmax over the k largest, zero elsewhere."""
    kept = np.argsort(-noisy_E, kind="stable")[:k]
    gate_E = np.zeros(len(noisy_E))
    gate_E[kept] = softmax(noisy_E[kept])
    return gate_E


def load_of_token(clean_E, noisy_E, std_E, k):
    """Equations 8 and 9, by leaving out each component in turn."""
    chance_E = np.zeros(len(clean_E))
    for i in range(len(clean_E)):
        others = np.sort(np.delete(noisy_E, i))[::-1]
        chance_E[i] = normal_cdf((clean_E[i] - others[k - 1]) / std_E[i])
    return chance_E


def expert(x_D, in_DF, out_FD):
    return np.maximum(x_D @ in_DF, 0.0) @ out_FD


def moe(x_TD, gate_DE, noise_DE, in_EDF, out_EFD, draw_TE, k, mask_T=None):
    """Equations 1-6, 8-10. `draw_TE` holds the normal draws; None: no noise.

    Returns:
        `(y_TD, importance_E, load_E)`.
    """
    num_tokens, num_experts = len(x_TD), gate_DE.shape[1]
    y_TD = np.zeros_like(x_TD)
    importance_E, load_E = np.zeros(num_experts), np.zeros(num_experts)
    for t in range(num_tokens):
        if mask_T is not None and not mask_T[t]:
            continue
        clean_E = x_TD[t] @ gate_DE
        noisy_E = clean_E
        if draw_TE is not None:
            std_E = softplus(x_TD[t] @ noise_DE)
            noisy_E = clean_E + draw_TE[t] * std_E
        gate_E = gates_of_token(noisy_E, k)
        for i in np.flatnonzero(gate_E):
            y_TD[t] += gate_E[i] * expert(x_TD[t], in_EDF[i], out_EFD[i])
        importance_E += gate_E
        if draw_TE is None or k == num_experts:
            load_E += gate_E > 0
        else:
            load_E += load_of_token(clean_E, noisy_E, std_E, k)
    return y_TD, importance_E, load_E
