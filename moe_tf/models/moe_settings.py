"""Settings of a model's MoE layers: the mapping `moe` that models take."""

from collections.abc import Mapping

# The names are `SparseMoE`'s; `None` leaves a choice to the variant or to the
# router.
DEFAULTS = {
    "num_experts": None,
    "k": None,
    "hidden_units": None,
    "gating": "noisy_top_k",
    "importance_weight": None,
    "load_weight": None,
    "capacity_factor": None,
    "num_groups": None,
    "recompute": False,
}
# A variant's description has these, since they decide the kernels' shapes.
_DESCRIBED = ("num_experts", "k", "hidden_units", "gating")
# `get_config` of earlier versions had the settings beside those of the model,
# translation models one of them under another name.
_FORMER_NAMES = {"expert_hidden": "hidden_units"}


def complete(moe: Mapping | None) -> dict:
    """Returns the mapping with a value for every setting.

    Args:
        moe: some of the keys of `DEFAULTS`. `None` as a value, or as the
            whole mapping, stands for the default.

    Raises:
        ValueError: a key is not among those of `DEFAULTS`.
    """
    moe = dict(moe or {})
    for name, value in moe.items():
        if name not in DEFAULTS:
            raise ValueError(
                f"`moe` must have keys among {', '.join(DEFAULTS)}. "
                f"Received: moe[{name!r}]={value}"
            )
    given = {name: value for name, value in moe.items() if value is not None}
    return {**DEFAULTS, **given}


def described(moe: Mapping) -> dict:
    """Returns the settings that a variant's description takes."""
    return {name: moe[name] for name in _DESCRIBED}


def of_layer(moe: Mapping) -> dict:
    """Returns the settings that `SparseMoE` takes besides a description's."""
    return {
        name: value
        for name, value in moe.items()
        if name == "gating" or name not in _DESCRIBED
    }


def nest_former_fields(config: Mapping) -> dict:
    """Returns a model's config with its MoE settings under `moe`.

    Configs saved by earlier versions have the settings beside the model's
    own; a config that has `moe` already stays as it is.
    """
    if "moe" in config:
        return dict(config)
    model, moe = {}, {}
    for name, value in config.items():
        new_name = _FORMER_NAMES.get(name, name)
        (moe if new_name in DEFAULTS else model)[new_name] = value
    return {**model, "moe": moe}
