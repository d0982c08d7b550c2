"""The table of docs/balance_losses.md: what a coefficient elsewhere is here."""

import math
import pathlib
import re

import numpy as np
import pytest

from moe_tf import losses

T, N, W = 30, 8, 4
PAGE = pathlib.Path(__file__).parents[1] / "docs" / "balance_losses.md"


def routing(k, seed):
    """Softmax of random logits, and how many tokens chose each expert."""
    logits_TE = np.random.default_rng(seed).normal(size=(T, N))
    probability_TE = np.exp(logits_TE)
    probability_TE /= probability_TE.sum(-1, keepdims=True)
    chosen_TK = np.argsort(-probability_TE)[:, :k]
    return probability_TE, np.bincount(chosen_TK.ravel(), minlength=N)


# Each as its project writes it, of softmax, counts and experts a token.


def switch(probability_TE, count_E, k):
    return N * np.sum(count_E / count_E.sum() * probability_TE.mean(0))


def gshard_paper(probability_TE, count_E, k):
    return np.mean(count_E / T * probability_TE.mean(0))


def mesh_tensorflow(probability_TE, count_E, k):
    return np.mean(count_E / T * probability_TE.mean(0)) * N**2


def megatron(probability_TE, count_E, k):
    return np.sum(probability_TE.sum(0) * count_E) * N / (k * T**2)


def transformers(probability_TE, count_E, k):
    return N * np.sum(count_E / T * probability_TE.mean(0))


def fastmoe(probability_TE, count_E, k):
    return np.mean(count_E / T * probability_TE.mean(0)) * (N / W) ** 2


def conversions():
    """The rows of the page's second table: system, and its last two cells."""
    _, table = PAGE.read_text().split("| system |")
    cells = [line.strip("| ").split(" | ") for line in table.splitlines()]
    return {row[0]: row[2:] for row in cells[2:] if len(row) == 4}


def worth(code, k):
    """A formula of the page in numbers, for a coefficient `c` of 1."""
    code = code.strip("`").replace("c k", "c * k").replace("^", "**")
    names = {"c": 1, "k": k, "n": N, "W": W}
    return eval(code, {"__builtins__": {}}, names)


@pytest.mark.parametrize(
    "system,theirs,k",
    [
        ("Switch, Mesh-TensorFlow", switch, 1),
        ("Switch, Mesh-TensorFlow", mesh_tensorflow, 1),
        ("GShard, as its paper writes it", gshard_paper, 1),
        ("Megatron-LM", megatron, 3),
        ("Hugging Face transformers", transformers, 3),
        ("FastMoE", fastmoe, 1),
    ],
)
def test_a_row_of_the_page_gives_their_gradient(system, theirs, k):
    # Times the page's weight our loss differs from theirs by a constant.
    (row,) = (
        cells
        for name, cells in conversions().items()
        if name.startswith(system)
    )
    at_balance, here = row
    (weight,) = re.findall(r"`load_weight = ([^`]+)`", here)
    differences = []
    for seed in range(3):
        probability_TE, count_E = routing(k, seed)
        ours = float(
            losses.load_balance_loss(probability_TE, count_E.astype("float64"))
        )
        differences.append(
            theirs(probability_TE, count_E, k) - worth(weight, k) * ours
        )
    want = worth(at_balance, k)
    np.testing.assert_allclose(differences, want, rtol=1e-6)


def test_the_rows_of_the_page_without_an_excess():
    rows = conversions()
    paper, z_loss = (
        next(cells for name, cells in rows.items() if name.startswith(start))
        for start in ("paper; tensor2tensor", "router z-loss")
    )
    assert paper[1].endswith("`importance_weight = load_weight = c`")
    even_E, one_E = np.full(N, 3.0), np.eye(N)[0]
    assert float(losses.cv_squared(even_E)) == worth(paper[0], 1) == 0
    assert float(losses.cv_squared(one_E)) == pytest.approx(N - 1)
    assert z_loss[1] == "`z_loss_weight = c`"
    logits_TE = np.log(np.full((T, N), 2.0))
    want = math.log(2 * N) ** 2
    assert float(losses.z_loss(logits_TE)) == pytest.approx(want)
    assert len(rows) == 7  # a new row wants a test


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
        probability_TE, count_E = routing(k, seed)
        ours = float(
            losses.load_balance_loss(probability_TE, count_E.astype("float64"))
        )
        assert ours > 1e-3
        want = value_at_balance * (1 + ours)
        assert theirs(probability_TE, count_E, k) == pytest.approx(
            want, rel=1e-6
        )
