import math

import numpy as np
import pytest

from moe_tf import numerics


def test_cv_squared_is_zero_at_balance_and_n_minus_1_at_collapse():
    assert float(numerics.cv_squared(np.full(7, 3.0))) == 0.0
    collapsed = np.array([0.0, 5.0, 0.0, 0.0, 0.0])
    assert float(numerics.cv_squared(collapsed)) == pytest.approx(4.0)


def test_cv_squared_matches_numpy_for_any_shape():
    x = np.random.default_rng(0).gamma(2.0, size=(3, 5))
    want = x.var() / x.mean() ** 2
    assert float(numerics.cv_squared(x)) == pytest.approx(want, rel=1e-6)


def test_cv_squared_of_an_empty_batch_is_zero():
    assert float(numerics.cv_squared(np.zeros(4))) == 0.0


@pytest.mark.parametrize("z", [-30.0, -2.0, 0.0, 0.5, 30.0])
def test_normal_cdf(z):
    want = 0.5 * math.erfc(-z / math.sqrt(2.0))
    got = float(numerics.normal_cdf(np.float64(z)))
    assert got == pytest.approx(want, abs=1e-15)
