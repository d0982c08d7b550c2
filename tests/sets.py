"""The three sets of tests: rows that wait for the second or the third.

Tests without a mark are the default set, which touches every feature in
minutes. `thorough` has the other meshes, optimizers and sizes; `slow` has
studies.
"""

import pytest


def thorough(*values):
    """Returns a row of `parametrize` for the thorough set."""
    return pytest.param(*values, marks=pytest.mark.thorough)


def slow(*values):
    """Returns a row of `parametrize` for the slow set."""
    return pytest.param(*values, marks=pytest.mark.slow)


def split(rows, default, slow_rows=()):
    """Returns all `rows`; those not in `default` are for the thorough set.

    Args:
        rows: iterable of values, or of tuples for several names.
        default: rows, each of them in `rows`.
        slow_rows: rows for the slow set, each of them in `rows`.
    """
    rows, default, slow_rows = map(list, (rows, default, slow_rows))
    assert all(row in rows for row in default + slow_rows), "an unknown row"
    marked = []
    for row in rows:
        values = row if isinstance(row, tuple) else (row,)
        if row in default:
            marked.append(row)
        else:
            marked.append((slow if row in slow_rows else thorough)(*values))
    return marked


# A program for XLA takes seconds to make.
JIT_COMPILE = pytest.mark.parametrize("jit_compile", [False, thorough(True)])
JIT_COMPILE_SLOW = pytest.mark.parametrize("jit_compile", [False, slow(True)])
