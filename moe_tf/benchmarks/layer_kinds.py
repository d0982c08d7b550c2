"""Kinds of layers that the benchmark compares, by name."""

import dataclasses
import math
from collections.abc import Iterable

import keras
import tensorflow as tf
from keras import ops

from moe_tf import checks
from moe_tf import layers
from moe_tf.benchmarks import steps
from moe_tf.types import Activation

_PLAIN = ("dense", "all_experts", "grouped")
NAMES = (*_PLAIN, "capacity:FACTOR", "two_level:BRANCHES")


@dataclasses.dataclass(frozen=True)
class Setting:
    """Sizes and options common to all rows of one table."""

    tokens: int  # T
    width: int  # D
    hidden: int  # F
    k: int
    dtype_policy: str = "float32"
    jit_compile: bool = False
    gating: str = "noisy_top_k"
    activation: str = "relu"

    @property
    def compute_dtype(self) -> str:
        return keras.dtype_policies.get(self.dtype_policy).compute_dtype

    @property
    def weight_bytes(self) -> int:
        """Bytes of one weight, and of its gradient."""
        policy = keras.dtype_policies.get(self.dtype_policy)
        return tf.as_dtype(policy.variable_dtype).size

    @property
    def useful_flops(self) -> int:
        """Operations of the chosen experts alone, forward and backward.

        Two products of `T * k` rows, each three times (itself, the gradient
        of its rows, the gradient of its weights), 2 a multiply-add.
        """
        return 3 * 2 * 2 * self.tokens * self.k * self.width * self.hidden


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table: a kind of layer and its number of experts.

    Attributes:
        kind: str, one of `NAMES` with its value filled in.
        num_experts: int; None for the dense layer.
    """

    kind: str
    num_experts: int | None = None


def table_rows(kinds: list[str], expert_counts: Iterable[int]) -> list[Row]:
    """Returns the dense row, then each kind with each number of experts."""
    return [
        Row("dense"),
        *(Row(kind, count) for count in expert_counts for kind in kinds),
    ]


def parse_kind(kind: str) -> tuple[str, float | int | None]:
    """Splits a kind of layer into its name and its value.

    Args:
        kind: str such as `"grouped"` or `"capacity:1.25"`.

    Returns:
        `(name, value)`: `("grouped", None)` or `("capacity", 1.25)`.

    Raises:
        ValueError: there is no such kind, or its value is out of range.
    """
    name, _, text = kind.partition(":")
    if kind in _PLAIN:
        return kind, None
    try:
        value = {"capacity": float, "two_level": int}[name](text)
    except (KeyError, ValueError):
        raise ValueError(
            f"`layers` are {', '.join(NAMES)}. Received: {kind}"
        ) from None
    if name == "capacity":
        checks.positive("capacity_factor", value)
    else:
        checks.at_least("branches", value, 1)
    return name, value


def make_layer(row: Row, setting: Setting) -> keras.layers.Layer:
    """Returns the layer of a row, not built yet.

    `two_level` is the hierarchical layer of appendix B. At each of its two
    levels it chooses the square root of `k`.

    Raises:
        ValueError: the row's kind does not suit its number of experts or `k`.
    """
    name, value = parse_kind(row.kind)
    kwargs = {
        "dtype": setting.dtype_policy,
        "activation": setting.activation,
    }
    if name == "dense":
        return layers.FeedForward((setting.hidden,), **kwargs)
    kwargs["k"] = setting.k
    if name == "all_experts":
        return AllExperts(row.num_experts, setting.hidden, **kwargs)
    kwargs["gating"] = setting.gating
    if name == "capacity":
        kwargs["capacity_factor"] = value
    if name == "two_level":
        kwargs["k"] = math.isqrt(setting.k)
        if kwargs["k"] ** 2 != setting.k or row.num_experts % value:
            raise ValueError(
                "`branches` of a two-level layer must divide the number of "
                "experts, and `k` must be a square. "
                f"Received: branches={value}, "
                f"num_experts={row.num_experts}, k={setting.k}"
            )
        kwargs["branching"] = (value, row.num_experts // value)
    return layers.SparseMoE(row.num_experts, setting.hidden, **kwargs)


def train_step(row: Row, setting: Setting) -> steps.TrainStep:
    """Returns a row's step; the dense layer gets `k` rows for each token."""
    return steps.TrainStep(
        make_layer(row, setting),
        setting.tokens * (setting.k if row.kind == "dense" else 1),
        setting.width,
        setting.jit_compile,
    )


def all_experts_bytes(num_experts: int, setting: Setting) -> int:
    """Bytes of hidden activations, outputs and the gradients of both."""
    units = 2 * (setting.hidden + setting.width)
    size = tf.as_dtype(setting.compute_dtype).size
    return setting.tokens * num_experts * units * size


class AllExperts(keras.layers.Layer):
    """Every expert on every token, weighted by a gate that is mostly zeros.

    The usual form in Keras: KerasHub's Mixtral computes its experts by
    these two einsums. The gate keeps the `k` largest of a softmax and makes
    them sum to 1, so without noise the outputs are those of `SparseMoE`.

    Args:
        num_experts: int, `E`.
        hidden_units: int, `F`.
        k: int, experts that get a weight, `1 <= k <= E`.
        activation: name or function inside the experts. Defaults to `"relu"`.

    Call arguments:
        inputs: float `(T, D)`.

    Returns:
        float `(T, D)`.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_units: int,
        k: int,
        activation: Activation = "relu",
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.num_experts = num_experts
        self.hidden_units = hidden_units
        self.k = k
        self.activation = keras.activations.get(activation)

    def build(self, input_shape):
        width = input_shape[-1]
        shape_EDF = (self.num_experts, width, self.hidden_units)
        shape_EFD = (self.num_experts, self.hidden_units, width)
        self.gate_DE = self.add_weight(
            shape=(width, self.num_experts), name="gate_kernel"
        )
        self.in_EDF = self.add_weight(shape=shape_EDF, name="expert_in_kernel")
        self.out_EFD = self.add_weight(
            shape=shape_EFD, name="expert_out_kernel"
        )

    def call(self, inputs):
        probability_TE = ops.softmax(ops.matmul(inputs, self.gate_DE))
        top_TK, expert_TK = ops.top_k(probability_TE, self.k)
        top_TK /= ops.sum(top_TK, axis=-1, keepdims=True)
        hot_TKE = ops.one_hot(expert_TK, self.num_experts, dtype=top_TK.dtype)
        weight_TE = ops.sum(top_TK[:, :, None] * hot_TKE, axis=1)
        h_ETF = self.activation(ops.einsum("TD,EDF->ETF", inputs, self.in_EDF))
        y_ETD = ops.einsum("ETF,EFD->ETD", h_ETF, self.out_EFD)
        return ops.sum(ops.transpose(weight_TE)[:, :, None] * y_ETD, axis=0)
