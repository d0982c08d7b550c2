"""Ids that a model may write: not padding or unknown, say."""

import numpy as np


def mask(vocabulary_size, forbidden_ids, end_id=None):
    """Which ids are not forbidden, bool `(V,)`.

    Raises:
        ValueError: an id is not in the vocabulary, none is left, or `end_id`
            is not.
    """
    allowed_V = np.ones(vocabulary_size, bool)
    ids = list(forbidden_ids)
    if ids and not 0 <= min(ids) <= max(ids) < vocabulary_size:
        raise ValueError(
            f"`forbidden_ids` must be in [0, {vocabulary_size}), the "
            f"vocabulary. Received: forbidden_ids={forbidden_ids}"
        )
    allowed_V[ids] = False
    if not allowed_V.any():
        raise ValueError(
            "`forbidden_ids` must leave an id to draw. Received: all "
            f"{vocabulary_size} of them"
        )
    if end_id is None:
        return allowed_V
    if not 0 <= end_id < vocabulary_size or not allowed_V[end_id]:
        raise ValueError(
            f"`end_id` must be in [0, {vocabulary_size}), the vocabulary, and "
            f"not among `forbidden_ids`. Received: end_id={end_id}, "
            f"forbidden_ids={forbidden_ids}"
        )
    return allowed_V
