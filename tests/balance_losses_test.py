"""The table of docs/balance_losses.md: what a coefficient elsewhere is here."""

import numpy as np
import pytest

from moe_tf import gating

T, N, W = 30, 8, 4


def routing(k, seed):
    """Softmax of random logits, and how many tokens chose each expert."""
    logits_TE = np.random.default_rng(seed).normal(size=(T, N))
    share_TE = np.exp(logits_TE)
    share_TE /= share_TE.sum(-1, keepdims=True)
    chosen_TK = np.argsort(-share_TE)[:, :k]
    return share_TE, np.bincount(chosen_TK.ravel(), minlength=N)


# Each as its project writes it, of softmax, counts and experts a token.


def switch(share_TE, count_E, k):
    return N * np.sum(count_E / count_E.sum() * share_TE.mean(0))


def gshard_paper(share_TE, count_E, k):
    return np.mean(count_E / T * share_TE.mean(0))


def mesh_tensorflow(share_TE, count_E, k):
    return np.mean(count_E / T * share_TE.mean(0)) * N**2


def megatron(share_TE, count_E, k):
    return np.sum(share_TE.sum(0) * count_E) * N / (k * T**2)


def transformers(share_TE, count_E, k):
    return N * np.sum(count_E / T * share_TE.mean(0))


def fastmoe(share_TE, count_E, k):
    return np.mean(count_E / T * share_TE.mean(0)) * (N / W) ** 2


@pytest.mark.parametrize(
    "theirs,k,value_at_balance",
    [
        (switch, 1, 1),
        (mesh_tensorflow, 1, 1),
        (gshard_paper, 1, 1 / N**2),
        (megatron, 1, 1),
        (megatron, 3, 1),
        (transformers, 1, 1),
        (transformers, 3, 3),
        (fastmoe, 1, 1 / W**2),
    ],
)
def test_theirs_is_ours_times_its_value_at_balance(theirs, k, value_at_balance):
    even_TE = np.full((T, N), 1 / N)
    even_E = np.full(N, k * T / N)
    assert theirs(even_TE, even_E, k) == pytest.approx(value_at_balance)
    for seed in range(3):  # and so do their gradients, for all routings
        share_TE, count_E = routing(k, seed)
        ours = float(gating.load_excess(share_TE, count_E.astype("float64")))
        assert ours > 1e-3
        want = value_at_balance * (1 + ours)
        assert theirs(share_TE, count_E, k) == pytest.approx(want, rel=1e-6)
