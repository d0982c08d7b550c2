"""Layers of models as plain data, with kernel shapes and operations."""

import dataclasses
import functools
import math
from collections.abc import Iterable

from moe_tf import checks
from moe_tf.routing import registry
from moe_tf.routing.router import Router


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
    """A mixture of one-hidden-layer experts, flat or of two levels.

    Attributes:
        num_experts: int, all of them.
        hidden_units: int, width of each expert's hidden layer.
        k: int, experts kept per word; with `branching`, branches kept per word
            and experts kept in each of them.
        branching: optional `(a, b)`, `a` branches of `b` experts with
            `a * b == num_experts` (appendix B). Defaults to `None`: flat.
        gating: str, see `SparseMoE`; it decides the gates' parameters.

    Raises:
        ValueError: if a number is below 1, `branching` does not split
            `num_experts`, or there are fewer than `k` to choose from.
    """

    num_experts: int
    hidden_units: int
    k: int = 4
    branching: tuple[int, int] | None = None
    gating: str = "noisy_top_k"

    def __post_init__(self):
        if self.branching is not None:
            self._check_branching()
        for field in ("num_experts", "hidden_units", "k"):
            checks.at_least(field, getattr(self, field), 1)
        if self.branching is None and self.k > self.num_experts:
            raise ValueError(
                "`k` must be between 1 and `num_experts`. "
                f"Received: k={self.k}, num_experts={self.num_experts}"
            )
        if self.branching is not None and self.k > min(self.branching):
            raise ValueError(
                "`k` must be between 1 and either number of `branching`. "
                f"Received: k={self.k}, branching={self.branching}"
            )

    def _check_branching(self):
        fits = (
            isinstance(self.branching, tuple)
            and len(self.branching) == 2
            and all(isinstance(n, int) and n >= 1 for n in self.branching)
            and math.prod(self.branching) == self.num_experts
        )
        if not fits:
            raise ValueError(
                "`branching` must be a tuple of two whole numbers of at least "
                "1 whose product is `num_experts`. Received: branching="
                f"{self.branching}, num_experts={self.num_experts}"
            )

    @property
    def router_class(self) -> type[Router]:
        """The class of the router."""
        return registry.router_class(self.gating, self.branching)

    @property
    def router_size(self) -> int | tuple[int, int]:
        """The first argument of the router: `num_experts` or `branching`."""
        return self.branching or self.num_experts

    @property
    def experts_per_word(self) -> int:
        """Number of experts of each word: `k`, or `k * k` on two levels."""
        return self.k if self.branching is None else self.k**2


def check_num_experts(
    name: str, branching: tuple[int, int] | None, num_experts: int | None
) -> None:
    """Raises `ValueError` if a two-level variant has another number.

    Args:
        name: str, the variant's.
        branching: optional `(a, b)` of the variant's experts.
        num_experts: optional int, the number that was asked for.
    """
    if branching is None or num_experts in (None, math.prod(branching)):
        return
    num_branches, branch_size = branching
    raise ValueError(
        f"`num_experts` must be left out or be {math.prod(branching)}: the "
        f"variant {name} has {num_branches} branches of {branch_size} experts. "
        f"Received: num_experts={num_experts}"
    )


def mixtures(layers: Iterable) -> list[Experts]:
    """Returns the layers that have experts."""
    return [layer for layer in layers if isinstance(layer, Experts)]


@functools.singledispatch
def layer_shapes(layer: object, width: int) -> list[tuple[int, ...]]:
    """Returns the shapes of a layer's kernels, for inputs `(..., width)`."""
    raise TypeError(f"No shapes for the layer {layer}")


@layer_shapes.register
def _(layer: Lstm, width):
    output = width if layer.projected else layer.units
    shapes = [(width, 4 * layer.units), (output, 4 * layer.units)]
    return shapes + [(layer.units, output)] * layer.projected


@layer_shapes.register
def _(layer: FeedForward, width):
    sizes = (width, *layer.hidden_units, width)
    return list(zip(sizes, sizes[1:], strict=False))


@layer_shapes.register
def _(layer: Experts, width):
    return [
        *layer.router_class.weight_shapes(width, layer.router_size),
        (layer.num_experts, width, layer.hidden_units),
        (layer.num_experts, layer.hidden_units, width),
    ]


def layer_operations(layer: object, width: int) -> int:
    """Counts the multiply-adds per word.

    Each weight of a matrix that a word reaches is one. Vectors are not
    counted: they scale or shift, or belong to no single word.
    """
    if not isinstance(layer, Experts):
        shapes = layer_shapes(layer, width)
        return sum(math.prod(shape) for shape in shapes if len(shape) > 1)
    gates = layer.router_class.operations_per_token(
        width, layer.router_size, layer.k
    )
    expert = 2 * width * layer.hidden_units
    return gates + layer.experts_per_word * expert


@dataclasses.dataclass(frozen=True)
class BidirectionalLstm:
    """Two projected LSTMs, one reading backwards, half the width from each.

    Attributes:
        units: int, memory cells of each.
    """

    units: int


@layer_shapes.register
def _(layer: BidirectionalLstm, width):
    cells, half = layer.units, width // 2
    return 2 * [(width, 4 * cells), (half, 4 * cells), (cells, half)]


@dataclasses.dataclass(frozen=True)
class AttentionFunction:
    """Scores of a source position for a target position, eqs. 21 and 22.

    Attributes:
        units: int, attention width.
    """

    units: int


@layer_shapes.register
def _(layer: AttentionFunction, width):
    return [(width, layer.units), (width, layer.units), (layer.units,)]


@dataclasses.dataclass(frozen=True)
class AttentionLstm:
    """A projected LSTM that reads a context beside its input.

    Attributes:
        units: int, memory cells.
    """

    units: int


@layer_shapes.register
def _(layer: AttentionLstm, width):
    cells = layer.units
    return [(2 * width, 4 * cells), (width, 4 * cells), (cells, width)]


@dataclasses.dataclass(frozen=True)
class SelfAttention:
    """Dot-product attention of a sequence to itself, without biases.

    Attributes:
        num_heads: int.
    """

    num_heads: int


@layer_shapes.register
def _(layer: SelfAttention, width):
    return [(width, 3 * width), (width, width)]


@dataclasses.dataclass(frozen=True)
class SourceAttention:
    """Dot-product attention to the source, without biases.

    Attributes:
        num_heads: int.
    """

    num_heads: int


@layer_shapes.register
def _(layer: SourceAttention, width):
    return [(width, width), (width, 2 * width), (width, width)]


@dataclasses.dataclass(frozen=True)
class Norm:
    """Layer normalization with a scale and an offset."""


@layer_shapes.register
def _(layer: Norm, width):
    return [(width,), (width,)]
