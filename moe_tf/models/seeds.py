"""Seeds for the layers of a model."""

import numpy as np


def split_seed(seed: int | None, num: int) -> list[int | None]:
    """Returns `num` different seeds made from one; all `None` from `None`.

    Each layer takes a seed of its own: layers with equal seeds would draw
    equal numbers.
    """
    if seed is None:
        return [None] * num
    return [
        int(word) & 0x7FFFFFFF
        for word in np.random.SeedSequence(seed).generate_state(num)
    ]
