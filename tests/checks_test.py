import math

import numpy as np
import pytest

from moe_tf import checks


@pytest.mark.parametrize(
    "check",
    [
        lambda: checks.at_least("n", 2, 2),
        lambda: checks.at_least("n", np.int64(3), 2),
        lambda: checks.at_least("n", None, 2, allow_none=True),
        lambda: checks.positive("n", 0.1),
        lambda: checks.positive("n", None, allow_none=True),
        lambda: checks.not_negative("n", 0),
    ],
)
def test_what_fits_passes(check):
    assert check() is None


@pytest.mark.parametrize("value", [1, 2.0, "2", True, None, math.nan])
def test_whole_numbers(value):
    with pytest.raises(ValueError, match=f"`n` must be .* n={value}"):
        checks.at_least("n", value, 2)


@pytest.mark.parametrize("value", [0, True, -1.0, math.inf, math.nan])
def test_positive_numbers(value):
    with pytest.raises(ValueError, match=f"`n` must be .* n={value}"):
        checks.positive("n", value)


@pytest.mark.parametrize("value", [-1e-9, False, math.inf, math.nan])
def test_numbers_not_below_zero(value):
    with pytest.raises(ValueError, match=f"`n` must be .* n={value}"):
        checks.not_negative("n", value)
