"""The layers that the benchmark compares, one name each."""

import dataclasses
import math

import keras
import tensorflow as tf
from keras import ops

from moe_tf import checks
from moe_tf import layers
from moe_tf.benchmarks import steps

_PLAIN = ("dense", "all_experts", "grouped")
NAMES = (*_PLAIN, "capacity:FACTOR", "groups:NUMBER")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all rows of one table share."""

    tokens: int  # T
    width: int  # D
    hidden: int  # F
    k: int
    dtype_policy: str = "float32"
    jit_compile: bool = False
    gating: str = "noisy_top_k"
    activation: str = "relu"

    @property
    def compute_dtype(self):
        return keras.dtype_policies.get(self.dtype_policy).compute_dtype

    @property
    def weight_bytes(self):
        """Bytes of a weight, and of its gradient."""
        policy = keras.dtype_policies.get(self.dtype_policy)
        return tf.as_dtype(policy.variable_dtype).size

    @property
    def useful_flops(self):
        """Forward and backward of the experts that were chosen, nothing else.

        Two products of `T * k` rows, each three times (itself, the gradient
        of its rows, the gradient of its weights), 2 a multiply-add.
        """
        return 3 * 2 * 2 * self.tokens * self.k * self.width * self.hidden


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer of the table: a way, and a number of experts unless dense."""

    way: str
    num_experts: int | None = None


def rows(names, nums_experts):
    """The dense row, then each way with each number of experts."""
    return [
        Row("dense"),
        *(Row(way, number) for number in nums_experts for way in names),
    ]


def parse(way):
    """`("capacity", 1.25)` for `capacity:1.25`; `None` where nothing follows.

    Raises:
        ValueError: if there is no such way, or no such number.
    """
    name, _, number = way.partition(":")
    if way in _PLAIN:
        return way, None
    try:
        value = {"capacity": float, "groups": int}[name](number)
    except (KeyError, ValueError):
        raise ValueError(
            f"`ways` are {', '.join(NAMES)}. Received: {way}"
        ) from None
    if name == "capacity":
        checks.positive("capacity_factor", value)
    else:
        checks.at_least("groups", value, 1)
    return name, value


def layer(row, setting):
    """The layer of a row, not built yet.

    `groups` has two levels, with the root of `k` experts at each.

    Raises:
        ValueError: if the row's way or number of experts cannot be.
    """
    name, value = parse(row.way)
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
    if name == "groups":
        kwargs["k"] = math.isqrt(setting.k)
        if kwargs["k"] ** 2 != setting.k or row.num_experts % value:
            raise ValueError(
                "`groups` must divide the number of experts, and `k` be a "
                f"square. Received: groups={value}, "
                f"num_experts={row.num_experts}, k={setting.k}"
            )
        kwargs["branching"] = (value, row.num_experts // value)
    return layers.SparseMoE(row.num_experts, setting.hidden, **kwargs)


def train_step(row, setting):
    """The step of a row; the dense layer gets the rows of `k` experts."""
    return steps.TrainStep(
        layer(row, setting),
        setting.tokens * (setting.k if row.way == "dense" else 1),
        setting.width,
        setting.jit_compile,
    )


def all_experts_bytes(num_experts, setting):
    """What hidden activations, outputs and gradients of both must take."""
    units = 2 * (setting.hidden + setting.width)
    size = tf.as_dtype(setting.compute_dtype).size
    return setting.tokens * num_experts * units * size


class AllExperts(keras.layers.Layer):
    """Every expert on every token, weighted by a gate that is mostly zeros.

    What Keras users have today: KerasHub's Mixtral computes its experts by
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
        self, num_experts, hidden_units, k, activation="relu", **kwargs
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
        chance_TE = ops.softmax(ops.matmul(inputs, self.gate_DE))
        top_TK, expert_TK = ops.top_k(chance_TE, self.k)
        top_TK /= ops.sum(top_TK, axis=-1, keepdims=True)
        hot_TKE = ops.one_hot(expert_TK, self.num_experts, dtype=top_TK.dtype)
        weight_TE = ops.sum(top_TK[:, :, None] * hot_TKE, axis=1)
        h_ETF = self.activation(ops.einsum("TD,EDF->ETF", inputs, self.in_EDF))
        y_ETD = ops.einsum("ETF,EFD->ETD", h_ETF, self.out_EFD)
        return ops.sum(ops.transpose(weight_TE)[:, :, None] * y_ETD, axis=0)
