import dataclasses

import pytest

from moe_tf.models import language_model_variants as variants
from moe_tf.models.language_model_variants import count
from moe_tf.models.language_model_variants import variant

EIGHT_MILLION = ["4xLSTM-512", "MoE-1-Wide", "MoE-1-Deep"]


# As computed from the paper's architecture, in millions; table 7 prints them
# with one decimal less or two.
@pytest.mark.parametrize(
    "name,parameters,ops",
    [
        ("LSTM-2048-512", "9.437", "9.437"),
        ("4xLSTM-512", "8.389", "8.389"),
        ("MoE-1-Wide", "8.389", "8.389"),
        ("MoE-1-Deep", "8.389", "8.389"),
        ("MoE-4", "8.393", "8.393"),
        ("MoE-32", "37.782", "8.421"),
        ("MoE-256", "272.892", "8.651"),
        ("2xLSTM-8192-1024", "150.995", "150.995"),
    ],
)
def test_counts_of_the_paper(name, parameters, ops):
    counts = count(variant(name))
    assert f"{counts.parameters / 1e6:.3f}" == parameters
    assert f"{counts.ops_per_timestep / 1e6:.3f}" == ops


def test_embedding_and_softmax_of_the_paper():
    total = variants.vocabulary_parameters(variant("MoE-32"), 793_471)
    assert total == 2 * 793_471 * 512
    assert f"{total / 1e6:.1f}" == "812.5"


@pytest.mark.parametrize("width", [1, 8, 100])
def test_family_stays_matched_at_other_widths(width):
    counts = {count(variant(name, width)) for name in EIGHT_MILLION}
    assert len(counts) == 1
    (baseline,) = counts
    for num_experts in (4, 32, 256):
        got = count(variant(f"MoE-{num_experts}", width))
        gates = 2 * width * num_experts
        assert got.ops_per_timestep == baseline.ops_per_timestep + gates


def test_any_number_of_experts():
    described = variant("MoE-64", width=16, k=2)
    assert described.layers[1] == variants.Experts(64, hidden_units=32, k=2)


def test_is_plain_data():
    described = variant("MoE-32")
    assert described == variant("MoE-32", width=512, k=4)
    assert dataclasses.asdict(described) == {
        "name": "MoE-32",
        "width": 512,
        "layers": (
            {"units": 512, "projected": False},
            {"num_experts": 32, "hidden_units": 1024, "k": 4},
            {"units": 512, "projected": False},
        ),
    }
    with pytest.raises(dataclasses.FrozenInstanceError):
        described.width = 3


@pytest.mark.parametrize(
    "name", ["", "MoE", "MoE-0", "MoE-04", "moe-4", "MoE-4-h", "MoE-4\n"]
)
def test_unknown_name_lists_the_known(name):
    with pytest.raises(ValueError, match="`name` must be one of") as error:
        variant(name)
    for known in ("4xLSTM-512", "LSTM-2048-512", *EIGHT_MILLION, "MoE-256"):
        assert known in str(error.value)


@pytest.mark.parametrize(
    "arguments,field",
    [
        ({"name": "MoE-2"}, "`k` must be between 1"),
        ({"name": "MoE-4", "k": 0}, "`k` must be between 1"),
        ({"name": "MoE-4", "k": 5}, "`k` must be between 1"),
        ({"name": "MoE-1-Wide", "k": 4}, "`k` is for the variants"),
        (
            {"name": "4xLSTM-512", "width": 0},
            "`width` must be a whole number of at least 1",
        ),
    ],
)
def test_refuses(arguments, field):
    with pytest.raises(ValueError, match=field):
        variant(**arguments)
