import pytest

from moe_tf import models
from moe_tf.models import moe_settings

FORMER = {
    "k": 2,
    "gating": "softmax_top_k",
    "importance_weight": 0.2,
    "load_weight": 0.3,
    "capacity_factor": 1.5,
    "num_groups": 2,
    "recompute": True,
}
SMALL = {"num_heads": 2, "encoder_layers": 2, "decoder_layers": 2}
CASES = [
    (models.LanguageModel, "MoE-4", {}),
    (models.Gnmt, "GNMT-MoE-4", {"expert_hidden": 6}),
    (models.Transformer, "Transformer-MoE-4", {"expert_hidden": 6, **SMALL}),
]


@pytest.mark.parametrize("model_class,variant,more", CASES)
def test_configs_of_before_are_read(model_class, variant, more):
    model = model_class.from_config(
        {"variant": variant, "vocabulary_size": 9, "width": 8, "seed": 1}
        | FORMER
        | more
    )
    moe = model.get_config()["moe"]
    assert moe == {
        **FORMER,
        "num_experts": None,
        "hidden_units": more.get("expert_hidden"),
    }
    layers = [
        layer for layer in model._flatten_layers() if hasattr(layer, "router")
    ]
    assert layers
    for layer in layers:
        assert layer.num_experts == 4 and layer.k == 2
        assert layer.capacity_factor == 1.5 and layer.num_groups == 2
        assert layer.experts.hidden_units == (more.get("expert_hidden") or 16)


@pytest.mark.parametrize("model_class,variant,more", CASES)
def test_an_unknown_key_is_named_with_the_known(model_class, variant, more):
    with pytest.raises(ValueError, match="`moe` must have.*") as error:
        model_class(variant, 9, moe={"experts": 3})
    for name in (*moe_settings.DEFAULTS, "moe['experts']=3"):
        assert name in str(error.value)


def test_none_stands_for_the_default():
    assert moe_settings.complete(None) == moe_settings.DEFAULTS
    nothing = dict.fromkeys(moe_settings.DEFAULTS)
    assert moe_settings.complete(nothing) == moe_settings.DEFAULTS
    assert moe_settings.complete({"k": 3})["k"] == 3
