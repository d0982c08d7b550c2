"""Seeds for the layers of a model."""

import numpy as np


def split(seed, num):
    """`num` seeds from one; all `None` from `None`.

    One each: with equal ones the draws of layers would be tied.
    """
    if seed is None:
        return [None] * num
    return [
        int(word) & 0x7FFFFFFF
        for word in np.random.SeedSequence(seed).generate_state(num)
    ]
