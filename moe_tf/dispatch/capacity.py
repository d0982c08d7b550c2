"""The capacity of an expert: how many tokens it takes at most."""

import fractions

from keras import ops

from moe_tf.types import Tensor


def expert_capacity(
    num_assignments: int | Tensor, num_experts: int, capacity_factor: float
) -> int | Tensor:
    """Returns `ceil(capacity_factor * A / E)`, the slots of an expert.

    The product is taken in whole numbers, of the factor as it is written to
    six digits: 1.1 * 100 / 10 is 11.

    Args:
        num_assignments: int or int scalar, `A = k * T` for `T` tokens.
        num_experts: int, `E`.
        capacity_factor: float above 0.

    Returns:
        An int for an int, else an int32 scalar.
    """
    # More digits, of 4 / 3 say, would overflow the products below.
    factor = fractions.Fraction(str(capacity_factor)).limit_denominator(10**6)
    parts = factor.denominator * num_experts
    if isinstance(num_assignments, int):
        return -(-num_assignments * factor.numerator // parts)
    product = ops.cast(num_assignments, "int64") * factor.numerator
    return ops.cast((product + parts - 1) // parts, "int32")
