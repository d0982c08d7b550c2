"""How many slots an expert has."""

import fractions

from keras import ops


def expert_capacity(num_assignments, num_experts, capacity_factor):
    """Slots an expert, `ceil(capacity_factor * A / E)`: an int for an int.

    `A` is the number of assignments that `T` tokens make, `k * T`.

    In whole numbers, of the factor as it is written to six digits: 1.1 *
    100 / 10 is 11.
    """
    # More digits, of 4 / 3 say, would overflow the products below.
    factor = fractions.Fraction(str(capacity_factor)).limit_denominator(10**6)
    parts = factor.denominator * num_experts
    if isinstance(num_assignments, int):
        return -(-num_assignments * factor.numerator // parts)
    wide = ops.cast(num_assignments, "int64") * factor.numerator
    return ops.cast((wide + parts - 1) // parts, "int32")
