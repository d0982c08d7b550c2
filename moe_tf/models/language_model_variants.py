"""The paper's language models as plain data, and what each one costs.

A variant is a width and a stack of layers, bottom first; embedding and
softmax are around all of them alike. `LanguageModel` builds it, `count`
adds it up without building anything.
"""

import dataclasses
import functools
import re

from moe_tf import checks


@dataclasses.dataclass(frozen=True)
class Lstm:
    """An LSTM without biases.

    Attributes:
        units: int, memory cells.
        projected: bool, whether the output is projected to the model width;
            the projection is then what recurs.
    """

    units: int
    projected: bool = False


@dataclasses.dataclass(frozen=True)
class FeedForward:
    """ReLU hidden layers and a linear output layer, without biases."""

    hidden_units: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Experts:
    """A flat mixture of `num_experts` one-hidden-layer experts."""

    num_experts: int
    hidden_units: int
    k: int = 4


@dataclasses.dataclass(frozen=True)
class Variant:
    """A language model but for its vocabulary.

    Attributes:
        name: str, the name in the paper's table 7.
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

    def __add__(self, other):
        return Counts(
            self.parameters + other.parameters,
            self.ops_per_timestep + other.ops_per_timestep,
        )


def _between_lstms(width, *layers):
    return (Lstm(width), *layers, Lstm(width))


# Name: the paper's width, and the layers at any width.
_BASELINES = {
    "4xLSTM-512": (512, lambda width: (Lstm(width),) * 4),
    "LSTM-2048-512": (512, lambda width: (Lstm(4 * width, projected=True),)),
    "2xLSTM-8192-1024": (
        1024,
        lambda width: (Lstm(8 * width, projected=True),) * 2,
    ),
    "MoE-1-Wide": (
        512,
        lambda width: _between_lstms(width, FeedForward((8 * width,))),
    ),
    "MoE-1-Deep": (
        512,
        lambda width: _between_lstms(width, FeedForward((2 * width,) * 4)),
    ),
}
_FLAT_MOE = re.compile(r"MoE-([1-9][0-9]*)")
_FLAT_MOE_WIDTH = 512


def variant(name, width=None, k=None):
    """Looks up a language model of section 5.1 and appendix C.

    Another `width` scales every layer of the family alike, so that variants
    which match in operations per word in the paper match there too.

    Args:
        name: str, `4xLSTM-512`, `LSTM-2048-512`, `2xLSTM-8192-1024`,
            `MoE-1-Wide`, `MoE-1-Deep`, or `MoE-<n>` for any number of
            experts; the paper has `MoE-4`, `MoE-32` and `MoE-256`.
        width: optional int, embedding width. Defaults to the paper's, 512
            (1024 for `2xLSTM-8192-1024`).
        k: optional int, experts kept per word, for `MoE-<n>` alone.
            Defaults to 4.

    Returns:
        A `Variant`.

    Raises:
        ValueError: if no variant has this name, or the width or `k` does
            not fit it.
    """
    checks.at_least("width", width, 1, none_is_fine=True)
    flat_moe = _FLAT_MOE.fullmatch(name)
    if flat_moe:
        return _flat_moe(name, int(flat_moe[1]), width or _FLAT_MOE_WIDTH, k)
    if name not in _BASELINES:
        raise ValueError(
            f"`name` must be one of {', '.join(_BASELINES)} or `MoE-<n>` with "
            f"n experts, such as MoE-4, MoE-32, MoE-256. Received: name={name}"
        )
    if k is not None:
        raise ValueError(
            "`k` is for the variants `MoE-<n>`; leave it out here. "
            f"Received: k={k}, name={name}"
        )
    paper_width, layers = _BASELINES[name]
    width = width or paper_width
    return Variant(name, width, layers(width))


def _flat_moe(name, num_experts, width, k):
    k = 4 if k is None else k
    if not 1 <= k <= num_experts:
        raise ValueError(
            "`k` must be between 1 and the number of experts. "
            f"Received: k={k}, name={name}"
        )
    experts = Experts(num_experts, hidden_units=2 * width, k=k)
    return Variant(name, width, _between_lstms(width, experts))


def count(variant):
    """Counts parameters and operations from the description alone.

    As in the paper's tables, embedding and softmax are left out, a
    multiply-add is one operation, and experts that a word does not reach
    cost nothing. Gates count twice, for `W_g` and `W_noise`.

    Args:
        variant: `Variant`.

    Returns:
        `Counts`.
    """
    costs = (_count_layer(layer, variant.width) for layer in variant.layers)
    return functools.reduce(Counts.__add__, costs, Counts(0, 0))


def vocabulary_parameters(variant, vocabulary_size):
    """Parameters of embedding and softmax, two separate `(V, D)` tables."""
    return 2 * vocabulary_size * variant.width


@functools.singledispatch
def _count_layer(layer, width):
    raise TypeError(f"No counting rule for the layer {layer}")


@_count_layer.register
def _(layer: Lstm, width):
    output = width if layer.projected else layer.units
    weights = (width + output) * 4 * layer.units
    weights += layer.units * output if layer.projected else 0
    return Counts(weights, weights)


@_count_layer.register
def _(layer: FeedForward, width):
    sizes = (width, *layer.hidden_units, width)
    weights = sum(i * o for i, o in zip(sizes, sizes[1:], strict=False))
    return Counts(weights, weights)


@_count_layer.register
def _(layer: Experts, width):
    gates = 2 * width * layer.num_experts
    expert = 2 * width * layer.hidden_units
    return Counts(
        gates + layer.num_experts * expert,
        gates + layer.k * expert,
    )
