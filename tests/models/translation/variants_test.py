import math

import pytest

from moe_tf.models import layer_specs as layers
from moe_tf.models.translation import factory
from moe_tf.models.translation import variants
from tests import sets

SMALL = {"width": 16}
NAMES = [
    "GNMT",
    "GNMT-wide",
    "GNMT-MoE-32",
    "GNMT-MoE-2x3-h",
    "GNMT-multi-6",
    "Transformer",
    "Transformer-MoE-4",
]


def millions(name, as_in_paper=True):
    """Operations and parameters with 32,000 and with 32,768 wordpieces."""
    counts = [
        variants.count(variants.variant(name), size, as_in_paper)
        for size in (32_000, 32_768)
    ]
    return (
        [count.ops_per_timestep / 1e6 for count in counts],
        [count.parameters / 1e6 for count in counts],
    )


@pytest.mark.parametrize(
    "name,operations,parameters",
    [  # paper.md section 9, derived from its tables 2 to 5
        ("GNMT-MoE-2048-h", (84.5, 84.9), (8690, 8692)),
        ("GNMT-MoE-512-h", (84.5, 84.9), (2248, 2250)),
        ("GNMT-MoE-32", (84.5, 84.9), (234, 236)),
        ("GNMT-multi-512", (101.3, 101.7), (8690, 8692)),
        ("GNMT-wide", (84.5, 84.9), (117, 119)),
        ("GNMT", (67.8, 68.2), (100, 102)),
    ],
)
def test_counts_of_the_paper(name, operations, parameters):
    got_operations, got_parameters = millions(name)
    assert [round(number, 1) for number in got_operations] == list(operations)
    assert parameters[0] <= min(got_parameters)
    assert max(got_parameters) <= parameters[1]


def test_gates_and_attention_add_little():
    for name in ("GNMT-MoE-2048-h", "GNMT-multi-512"):
        for ours, paper in zip(millions(name, False), millions(name), strict=1):
            for one, other in zip(ours, paper, strict=True):
                assert 1 < one / other < 1.02
    # 32 and 32 * 64 gates of 512 with their noise, twice, and eq. 22.
    (_, ours), (_, paper) = (
        millions("GNMT-MoE-2048-h", 0),
        millions("GNMT-MoE-2048-h"),
    )
    gates = 2 * 2 * 512 * (32 + 32 * 64)
    attention = 2 * 512 * 512 + 512
    assert ours[0] - paper[0] == pytest.approx((gates + attention) / 1e6)


def test_experts_of_half_a_net_cost_what_the_net_does():
    dense, sparse = (
        variants.count(variants.variant(name), 1000, as_in_paper=True)
        for name in ("Transformer", "Transformer-MoE-8")
    )
    assert sparse.ops_per_timestep == dense.ops_per_timestep
    assert sparse.parameters > dense.parameters


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("number", [sets.thorough(0), 1])
def test_weights_are_as_many_as_counted(name, number):
    sizes = {"width": 16}
    if name.startswith("GNMT") and number:
        sizes |= {"bidirectional": True, "cells": 12, "attention_units": 5}
        sizes |= {"encoder_layers": 4, "decoder_layers": 3}
    if name.startswith("Transformer") and number:
        sizes |= {"num_heads": 2, "feed_forward": 12, "tie_embeddings": False}
        sizes |= {"encoder_layers": 3, "decoder_layers": 2}
    model = factory.make_translation_model(name, 19, **sizes)
    model.build()
    shapes = [tuple(w.shape) for w in model.trainable_weights]
    want = variants.count(model.variant, 19).parameters
    assert sum(map(math.prod, shapes)) == want
    assert sorted(shapes) == sorted(variants.kernel_shapes(model.variant, 19))


@pytest.mark.parametrize("name", ["GNMT-MoE-6", "GNMT-MoE-2x3-h"])
def test_weights_of_batchwise_gates_are_counted(name):
    model = factory.make_translation_model(
        name, 19, moe={"gating": "batchwise"}, **SMALL
    )
    model.build()
    shapes = [tuple(w.shape) for w in model.trainable_weights]
    want = variants.count(model.variant, 19).parameters
    assert sum(map(math.prod, shapes)) == want
    assert sorted(shapes) == sorted(variants.kernel_shapes(model.variant, 19))


def test_experts_stand_where_the_paper_has_them():
    described = variants.variant("GNMT-MoE-32")
    kinds = [type(layer).__name__ for layer in described.encoder]
    assert kinds == ["Lstm", "Lstm", "Experts", "Lstm"]
    kinds = [type(layer).__name__ for layer in described.decoder]
    assert kinds == ["AttentionFunction", "AttentionLstm", "Experts", "Lstm"]
    experts = layers.Experts(32, hidden_units=2048, k=4)
    assert described.layers.count(experts) == 2
    multi = variants.variant("GNMT-multi-512")
    assert layers.Experts(512, hidden_units=8192, k=2) in multi.layers
    assert variants.variant("GNMT-MoE-2048-h").encoder[2].branching == (32, 64)


@pytest.mark.parametrize(
    "name,num_experts",
    [
        ("GNMT-MoE-32", 6),
        ("GNMT-multi-512", 6),
        ("GNMT-MoE-4x4-h", 16),
        ("Transformer-MoE-8", 6),
    ],
)
def test_sizes_of_experts_override_those_of_the_name(name, num_experts):
    described = variants.variant(
        name, num_experts=num_experts, k=3, hidden_units=5
    )
    for experts in layers.mixtures(described.layers):
        assert experts.num_experts == num_experts
        assert experts.k == 3 and experts.hidden_units == 5


@pytest.mark.parametrize("every,where", [(None, [1, 3, 5]), (3, [2, 5])])
def test_every_other_block_of_a_transformer_has_experts(every, where):
    described = variants.variant("Transformer-MoE-4", moe_every=every)
    nets = [
        layer
        for layer in described.encoder
        if isinstance(layer, layers.FeedForward | layers.Experts)
    ]
    experts = [isinstance(net, layers.Experts) for net in nets]
    assert [index for index, here in enumerate(experts) if here] == where


@pytest.mark.parametrize(
    "name,settings,message",
    [
        ("MoE-32", {}, "name=MoE-32"),
        ("GNMT-MoE-0", {}, "name=GNMT-MoE-0"),
        ("GNMT", {"k": 2}, "k=2"),
        ("GNMT", {"num_heads": 2}, "num_heads=2"),
        ("Transformer", {"cells": 2}, "cells=2"),
        ("Transformer", {"moe_every": 2}, "moe_every=2"),
        ("GNMT", {"width": 0}, "width=0"),
        ("GNMT", {"gating": "switch"}, "gating=switch"),
        ("GNMT-MoE-4", {"gating": "expert_choice"}, "later words"),
        ("GNMT-MoE-4", {"k": 5}, "k=5"),
        ("GNMT-MoE-4", {"decoder_layers": 1}, "decoder_layers=1"),
        ("GNMT", {"width": 5, "bidirectional": True}, "width=5"),
        ("Transformer", {"width": 12}, "num_heads=8"),
        ("Transformer-MoE-4", {"feed_forward": 9}, "feed_forward=9"),
        ("Transformer", {"num_experts": 4}, "num_experts=4"),
        ("GNMT-wide", {"num_experts": 4}, "num_experts=4"),
        ("GNMT-MoE-4", {"num_experts": 0}, "num_experts=0"),
        ("GNMT-MoE-4x4-h", {"num_experts": 8}, "16.*num_experts=8"),
    ],
)
def test_what_does_not_fit_is_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        variants.variant(name, **settings)


def test_make_names_the_settings_that_there_are():
    with pytest.raises(ValueError, match="attention_form"):
        factory.make_translation_model("GNMT", 9, num_heads=2)
    with pytest.raises(ValueError, match="num_heads"):
        factory.make_translation_model("Transformer", 9, attention_form="sum")
    assert (
        factory.make_translation_model("GNMT", 9, num_heads=None).built is False
    )
