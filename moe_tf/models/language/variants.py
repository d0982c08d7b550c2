"""The paper's language models as plain data, with parameters and operations.

A variant is a width and a stack of layers, bottom first; embedding and
softmax are the same in all. `LanguageModel` makes the model, `count` counts
without making anything.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import NamedTuple

from moe_tf import checks
from moe_tf.models.layer_specs import Experts
from moe_tf.models.layer_specs import FeedForward
from moe_tf.models.layer_specs import Lstm
from moe_tf.models.layer_specs import check_num_experts
from moe_tf.models.layer_specs import layer_operations
from moe_tf.models.layer_specs import layer_shapes


@dataclasses.dataclass(frozen=True)
class Variant:
    """A language model but for its vocabulary.

    Attributes:
        name: str, as `variant` takes it.
        width: int, width of the embedding and of every layer's output.
        layers: tuple of `Lstm`, `FeedForward` and `Experts`, bottom first.
    """

    name: str
    width: int
    layers: tuple[Lstm | FeedForward | Experts, ...]


@dataclasses.dataclass(frozen=True)
class Counts:
    """Cost of a variant without its embedding and softmax.

    Attributes:
        parameters: int.
        ops_per_timestep: int, forward multiply-adds per word.
    """

    parameters: int
    ops_per_timestep: int


class _Family(NamedTuple):
    """A variant at any width: the paper's settings, and its layers."""

    width: int
    k: int | None  # `None` where nothing is chosen
    layers: Callable  # of the width and `k`


def _between_lstms(width, *layers):
    return (Lstm(width), *layers, Lstm(width))


def _flat(num_experts):
    return _Family(
        512,
        4,
        lambda width, k: _between_lstms(
            width, Experts(num_experts, 2 * width, k)
        ),
    )


def _two_level(a, b):
    return _Family(
        512,
        2,
        lambda width, k: _between_lstms(
            width, Experts(a * b, 2 * width, k, branching=(a, b))
        ),
    )


# The paper does not say how it splits the experts of these two; it runs both
# on 32 GPUs, and 32 groups give its counts to the last printed digit.
def _moe_34m(width, k):
    return _between_lstms(
        width, Experts(1024, 2 * width, k, branching=(32, 32))
    )


def _moe_143m(width, k):
    lstm = Lstm(4 * width, projected=True)
    return (lstm, Experts(256, 8 * width, k, branching=(32, 8)), lstm)


_NAMED = {
    "4xLSTM-512": _Family(512, None, lambda width, k: (Lstm(width),) * 4),
    "LSTM-2048-512": _Family(
        512, None, lambda width, k: (Lstm(4 * width, projected=True),)
    ),
    "2xLSTM-8192-1024": _Family(
        1024, None, lambda width, k: (Lstm(8 * width, projected=True),) * 2
    ),
    "MoE-1-Wide": _Family(
        512,
        None,
        lambda width, k: _between_lstms(width, FeedForward((8 * width,))),
    ),
    "MoE-1-Deep": _Family(
        512,
        None,
        lambda width, k: _between_lstms(width, FeedForward((2 * width,) * 4)),
    ),
    # The 1-billion-word models; the other corpus has 32 x 8, 32 x 32, 64 x 64.
    "MoE-256-h": _two_level(16, 16),
    "MoE-1024-h": _two_level(16, 64),
    "MoE-4096-h": _two_level(16, 256),
    # The 100-billion-word models alone.
    "MoE-16384-h": _two_level(128, 128),
    "MoE-65536-h": _two_level(256, 256),
    "MoE-131072-h": _two_level(256, 512),
    "MoE-34M": _Family(1024, 2, _moe_34m),
    "MoE-143M": _Family(1024, 2, _moe_143m),
}
_FLAT = re.compile(r"MoE-([1-9][0-9]*)")
_TWO_LEVEL = re.compile(r"MoE-([1-9][0-9]*)x([1-9][0-9]*)-h")


def variant(
    name: str,
    width: int | None = None,
    k: int | None = None,
    gating: str = "noisy_top_k",
    num_experts: int | None = None,
    hidden_units: int | None = None,
) -> Variant:
    """Looks up a language model of sections 5.1, 5.2, appendices C and D.

    Another `width` scales every layer of the family alike, so that variants
    which match in operations per word in the paper match there too.

    Args:
        name: str, one of
            - `4xLSTM-512`, `LSTM-2048-512`, `2xLSTM-8192-1024`,
              `MoE-1-Wide`, `MoE-1-Deep`, which choose nothing;
            - `MoE-<n>` for any number of experts; the paper has `MoE-4`,
              `MoE-32` and `MoE-256`;
            - `MoE-<a>x<b>-h` for `a` branches of `b` experts;
            - `MoE-256-h`, `MoE-1024-h`, `MoE-4096-h`: 16 groups, as on the
              1-billion-word corpus. Those on the 100-billion-word corpus are
              `MoE-32x8-h`, `MoE-32x32-h` and `MoE-64x64-h`;
            - `MoE-16384-h`, `MoE-65536-h`, `MoE-131072-h`: 128 x 128,
              256 x 256 and 256 x 512, as on the 100-billion-word corpus;
            - `MoE-34M` and `MoE-143M`: 32 x 32 and 32 x 8 larger experts.
        width: optional int, embedding width. Defaults to the paper's, 512
            (1024 for `2xLSTM-8192-1024`, `MoE-34M` and `MoE-143M`).
        k: optional int, experts kept per word of `MoE-<n>`; of the two-level
            variants, groups kept per word and experts kept in each. Defaults
            to 4, and to 2 at each level.
        gating: str, see `SparseMoE`. Only with the default, the paper's, are
            the counts those of its tables.
        num_experts: optional int, in place of the number in `MoE-<n>`. A
            two-level variant has as many as its name says.
        hidden_units: optional int, hidden width of each expert. Defaults to
            twice the width (8 times for `MoE-143M`).

    Returns:
        A `Variant`.

    Raises:
        ValueError: if no variant has this name, or a setting does not fit it.
    """
    checks.at_least("width", width, 1, allow_none=True)
    family = _look_up(name, num_experts)
    if family.k is None:
        _refuse_moe_settings(name, k, gating, num_experts, hidden_units)
    if gating == "expert_choice":
        raise ValueError(
            "`gating` of a language model must not look at later words, as "
            f"expert_choice does. Received: gating={gating}"
        )
    width = family.width if width is None else width
    k = family.k if k is None else k
    changes = {"gating": gating}
    if hidden_units is not None:
        changes["hidden_units"] = hidden_units
    layers = []
    for layer in family.layers(width, k):
        if isinstance(layer, Experts):
            check_num_experts(name, layer.branching, num_experts)
            layer = dataclasses.replace(layer, **changes)
        layers.append(layer)
    return Variant(name, width, tuple(layers))


def _refuse_moe_settings(name, k, gating, num_experts, hidden_units):
    """Raises `ValueError` for a setting of experts where there are none."""
    for field, value, default in (
        ("num_experts", num_experts, None),
        ("k", k, None),
        ("hidden_units", hidden_units, None),
        ("gating", gating, "noisy_top_k"),
    ):
        if value != default:
            raise ValueError(
                f"`{field}` is for the variants with a choice of experts; "
                f"leave it out here. Received: {field}={value}, name={name}"
            )


def _look_up(name, num_experts):
    if name in _NAMED:
        return _NAMED[name]
    if flat := _FLAT.fullmatch(name):
        return _flat(int(flat[1]) if num_experts is None else num_experts)
    if split := _TWO_LEVEL.fullmatch(name):
        return _two_level(int(split[1]), int(split[2]))
    raise ValueError(
        f"`name` must be one of {', '.join(_NAMED)}, or `MoE-<n>` with n "
        "experts, such as MoE-4, MoE-32, MoE-256, or `MoE-<a>x<b>-h` with a "
        "groups of b experts, such as MoE-64x64-h; n, a and b are at least 1. "
        f"Received: name={name}"
    )


def count(variant: Variant) -> Counts:
    """Counts parameters and operations from the description alone.

    As in the paper's tables, embedding and softmax are left out, a
    multiply-add is one operation, and experts that a word does not reach
    cost nothing. Gates count twice, for `W_g` and `W_noise`. On two levels a
    word reaches the gates of `k` groups.

    Args:
        variant: `Variant`.

    Returns:
        `Counts`.
    """
    width = variant.width
    return Counts(
        parameters=sum(
            math.prod(shape)
            for layer in variant.layers
            for shape in layer_shapes(layer, width)
        ),
        ops_per_timestep=sum(
            layer_operations(layer, width) for layer in variant.layers
        ),
    )


def vocabulary_parameters(variant: Variant, vocabulary_size: int) -> int:
    """Counts the parameters of embedding and softmax, two `(V, D)` tables."""
    return 2 * vocabulary_size * variant.width


def kernel_shapes(
    variant: Variant, vocabulary_size: int
) -> list[tuple[int, ...]]:
    """Returns the shapes of all kernels, embedding and softmax included."""
    table = (vocabulary_size, variant.width)
    shapes = [table, table]
    for layer in variant.layers:
        shapes += layer_shapes(layer, variant.width)
    return shapes
