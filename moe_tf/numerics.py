"""Small numerical functions that several modules share."""

import math

from keras import ops


def cv_squared(x):
    """Squared coefficient of variation, variance / mean^2, over all of `x`.

    0 when all entries are equal, `n - 1` when one of `n` entries holds
    everything. The variance is that of the population. An all-zero `x` (a
    batch without a single real token) gives 0, not NaN.

    Args:
        x: float tensor of any shape.

    Returns:
        A scalar of the dtype of `x`.
    """
    mean = ops.mean(x)
    variance = ops.mean(ops.square(x - mean))
    return variance / (ops.square(mean) + 1e-10)


def normal_cdf(z):
    """Cumulative distribution function of the standard normal."""
    return 0.5 * (1.0 + ops.erf(z / math.sqrt(2.0)))
