"""What SparseMoE refuses, and that the message says why."""

import numpy as np
import pytest

from moe_tf.layers import moe


@pytest.mark.parametrize("shape", [(5, 3), (3,), (3, 1), (3, 5, 6)])
def test_a_mask_of_another_shape_is_refused(shape):
    layer = moe.SparseMoE(5, 7)
    with pytest.raises(ValueError, match=r"`mask` must .*inputs of shape"):
        layer(np.ones((3, 5, 6)), mask=np.ones(shape, bool))


@pytest.mark.parametrize(
    "capacity_factor", [0, -1.0, True, float("nan"), float("inf")]
)
def test_bad_capacity_names_the_field(capacity_factor):
    with pytest.raises(ValueError, match="`capacity_factor`.*Received"):
        moe.SparseMoE(4, 5, capacity_factor=capacity_factor)


def test_unknown_width_is_refused():
    with pytest.raises(ValueError, match="last axis"):
        moe.SparseMoE(4, 5).build((None, None))


@pytest.mark.parametrize("shape", [(3, 7), (2, 3, 5)])
def test_another_width_than_the_first_is_refused(shape):
    layer = moe.SparseMoE(5, 7)
    layer.build((None, 6))
    with pytest.raises(ValueError, match="expected axis -1 .* value 6"):
        layer(np.ones(shape))
