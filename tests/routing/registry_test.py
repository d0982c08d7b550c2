import pytest

import moe_tf
from moe_tf import layers


def test_a_router_serves_one_layer():
    # Of a shared one a file would hold the weights in one place only.
    mine = layers.NoisyTopKRouter(4, k=2)
    moe_tf.SparseMoE(4, 5, gating=mine)
    with pytest.raises(ValueError, match="a router of its own"):
        moe_tf.SparseMoE(4, 5, gating=mine)


@pytest.mark.parametrize(
    "make,field",
    [
        (lambda **kw: layers.BatchwiseRouter(8, 2, **kw), "load_weight"),
        (lambda **kw: layers.ExpertChoiceRouter(8, 2, **kw), "load_weight"),
        (lambda **kw: layers.HierarchicalRouter((2, 4), **kw), "z_loss_weight"),
        (lambda **kw: layers.NoisyTopKRouter(8, **kw), "load_weight"),
    ],
)
def test_weights_without_meaning_or_number_are_refused(make, field):
    value = "much" if make().load_weight else 0.3
    with pytest.raises(ValueError, match=f"`{field}`.*Received: {field}="):
        make(**{field: value})
