"""Ids that a decoder may write: all but padding and unknown, for instance."""

import math
from collections.abc import Iterable

import numpy as np
from keras import ops

from moe_tf.types import Tensor


def forbid_ids(
    logits_NV: Tensor, forbidden_ids: Iterable[int], end_id: int | None = None
) -> Tensor:
    """Returns the logits with `-inf` for each id that is forbidden.

    Raises:
        ValueError: an id is not in the vocabulary, none is left, or `end_id`
            is not.
    """
    allowed_V = allowed_mask(logits_NV.shape[-1], forbidden_ids, end_id)
    return ops.where(allowed_V, logits_NV, -math.inf)


def allowed_mask(
    vocabulary_size: int,
    forbidden_ids: Iterable[int],
    end_id: int | None = None,
) -> np.ndarray:
    """Returns the mask of the ids that are not forbidden, bool `(V,)`.

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
