"""Base classes of routers, and the interface that `SparseMoE` uses."""

import math
import typing

import keras
from keras import ops

from moe_tf import checks
from moe_tf import losses as balance_losses
from moe_tf.routing import gating
from moe_tf.types import Tensor


class Routing(typing.NamedTuple):
    """The decisions of a router for `T` tokens, with their statistics.

    Attributes:
        gates: `Gates`, the chosen experts and their weights.
        importance_E: float, sum of each expert's gate values, equation 6.
        load_E: float, number of tokens that each expert is expected to
            receive, equation 10; without noise, number of tokens that it
            receives.
        losses: dictionary of float scalars, the router's losses before their
            weights. The balance losses are 0 at perfect balance.

    Example:

    >>> router = moe_tf.layers.SoftmaxTopKRouter(num_experts=4, k=2)
    >>> routing = router(np.ones((3, 8), "float32"))
    >>> routing.gates.expert_TK.shape
    TensorShape([3, 2])
    >>> sorted(routing.losses)
    ['importance_loss', 'load_loss']
    """

    gates: gating.Gates
    importance_E: Tensor
    load_E: Tensor
    losses: dict[str, Tensor]


class Router(keras.layers.Layer):
    """Base class of the routers, which choose the experts of each token.

    `SparseMoE` takes an instance of any subclass as `gating`. A subclass
    chooses experts in `call`, which ends in `return self.routing(...)`. The
    method `routing` computes statistics and losses of the batch; `SparseMoE`
    adds the losses in training.

    For a loss of its own, a subclass sets a weight in its constructor, as in
    `self.loss_weights["my_loss"] = 0.1`, and passes the value of the loss, as
    in `self.routing(gates, mask, my_loss=value)`.

    The router's dtype is float32 under every dtype policy except float64;
    `SparseMoE` casts the inputs and the gates. Masked tokens arrive as zeros,
    and `routing` takes them out of the gates.

    `self.num_groups` is the number of token groups of the `SparseMoE` that
    the router belongs to, or `None`. The class attribute `chooses_in_groups`
    is True for routers in which experts choose tokens; each expert then
    chooses in each group.

    Args:
        num_experts: int, `E`.
        k: int, experts of each token, `1 <= k <= E`; the mean number where
            the number of experts differs between tokens.
        importance_weight: float, weight of the importance loss, equation 7;
            0 turns it off. Defaults to `0.0`.
        load_weight: float, weight of the load loss; 0 turns it off. Defaults
            to `0.0`.
        z_loss_weight: float, weight of `losses.z_loss`; 0 turns it off.
            Defaults to `0.0`.

    Call arguments:
        inputs: float `(T, D)`.
        mask: optional bool `(T,)`.
        training: bool.

    Returns:
        `Routing`.

    Example:

    >>> class SignRouter(moe_tf.layers.Router):
    ...     def call(self, inputs, mask=None, training=False):
    ...         expert_TK = ops.cast(inputs[:, :1] > 0, "int32")
    ...         weight_TK = ops.ones_like(inputs[:, :1])
    ...         gates = moe_tf.layers.Gates(weight_TK, expert_TK)
    ...         return self.routing(gates, mask)
    >>> router = SignRouter(num_experts=2, k=1)
    >>> layer = moe_tf.SparseMoE(2, hidden_units=16, gating=router)
    >>> layer(np.ones((5, 8), "float32")).shape
    TensorShape([5, 8])
    """

    chooses_in_groups = False

    def __init__(
        self,
        num_experts: int,
        k: int,
        importance_weight: float = 0.0,
        load_weight: float = 0.0,
        z_loss_weight: float = 0.0,
        dtype: str | keras.DTypePolicy | None = None,
        **kwargs,
    ):
        super().__init__(dtype=router_dtype(dtype), **kwargs)
        checks.at_least("num_experts", num_experts, 1)
        checks.at_least("k", k, 1)
        if k > num_experts:
            raise ValueError(
                "`k` must be between 1 and `num_experts`. "
                f"Received: k={k}, num_experts={num_experts}"
            )
        checks.not_negative("importance_weight", importance_weight)
        checks.not_negative("load_weight", load_weight)
        checks.not_negative("z_loss_weight", z_loss_weight)
        self.num_experts = num_experts
        self.k = k
        self.experts_per_token = k
        self.importance_weight = importance_weight
        self.load_weight = load_weight
        self.z_loss_weight = z_loss_weight
        self.loss_weights = {
            "importance_loss": importance_weight,
            "load_loss": load_weight,
        }
        if z_loss_weight:
            self.loss_weights["z_loss"] = z_loss_weight
        self.is_taken = False  # By a `SparseMoE`.
        self.num_groups = None  # Set by the `SparseMoE`.
        self.supports_masking = True

    def build(self, input_shape):
        self.built = True

    def routing(
        self,
        gates: gating.Gates,
        mask: Tensor | None = None,
        *,
        load_E: Tensor | None = None,
        logits_TE: Tensor | None = None,
        **losses: Tensor,
    ) -> Routing:
        """Returns the `Routing` of gates: statistics and losses beside them.

        Args:
            gates: `Gates`; experts of another integer dtype are cast.
            mask: optional bool `(T,)`, the argument of `call`.
            load_E: optional float `(E,)`. Defaults to the number of tokens
                that each expert receives.
            logits_TE: optional float, for the z-loss.
            **losses: float scalars by name. `load_loss` defaults to
                `losses.load_loss(load_E)`, equation 11.

        Raises:
            ValueError: if the names of the losses are not those in
                `loss_weights`, or the z-loss lacks `logits_TE`.
        """
        weight_TK, expert_TK = gates
        gates = gating.Gates(weight_TK, ops.cast(expert_TK, "int32"))
        gates = gating.mask_gates(gates, self.num_experts, mask)
        importance_E = gating.importance(gates, self.num_experts)
        if load_E is None:
            load_E = gating.count_assigned(gates, self.num_experts)
        losses.setdefault("load_loss", balance_losses.load_loss(load_E))
        losses["importance_loss"] = balance_losses.importance_loss(importance_E)
        if self.z_loss_weight:
            if logits_TE is None:
                raise ValueError(
                    "`z_loss_weight` is for routers that give `logits_TE` to "
                    f"`routing`. Received: z_loss_weight={self.z_loss_weight}"
                )
            losses["z_loss"] = balance_losses.z_loss(logits_TE, mask)
        if set(losses) != set(self.loss_weights):
            raise ValueError(
                "Each loss needs a weight in `loss_weights`, and each weight "
                f"a loss. Received: losses {sorted(losses)}, "
                f"loss_weights={dict(self.loss_weights)}"
            )
        return Routing(gates, importance_E, load_E, losses)

    def weighted(self, losses: dict[str, Tensor]) -> list[Tensor]:
        """Multiplies losses with their weights; leaves out weights of 0.

        Args:
            losses: `losses` of a `Routing`.
        """
        return [
            weight * losses[name]
            for name, weight in self.loss_weights.items()
            if weight
        ]

    def max_tokens_per_expert(
        self, num_tokens: int | Tensor, training: bool
    ) -> int | Tensor | None:
        """Returns the largest number of tokens that an expert may get.

        Under XLA an expert has so many slots.

        Args:
            num_tokens: int, `T`, masked tokens included; of one token group
                if `chooses_in_groups`.
            training: bool.

        Returns:
            An int, or `None` if the number is not known before routing.
        """
        return None

    @classmethod
    def weight_shapes(
        cls, width: int, num_experts: int
    ) -> list[tuple[int, ...]]:
        """Returns the shapes of the weights that `build` adds, in any order.

        A class method, so that models can be planned without building them.

        Args:
            width: int, `D`.
            num_experts: int, `E`; with two levels `branching`, `(P, Q)`.
        """
        return []

    @classmethod
    def operations_per_token(cls, width: int, num_experts: int, k: int) -> int:
        """Counts the multiply-adds of the gates for one token.

        Args:
            width, num_experts: see `weight_shapes`.
            k: int, as for the constructor.
        """
        shapes = cls.weight_shapes(width, num_experts)
        return sum(math.prod(shape) for shape in shapes if len(shape) > 1)

    def get_config(self):
        own = (
            "num_experts",
            "k",
            "importance_weight",
            "load_weight",
            "z_loss_weight",
        )
        return {
            **super().get_config(),
            **{name: getattr(self, name) for name in own},
        }


class GateRouter(Router):
    """Base class of the routers whose logits are `x W_g`, without noise.

    Without noise, equal logits would send every token to the same experts, so
    the kernel starts small but not at zero.
    """

    def build(self, input_shape):
        self.gate_DE = self.add_weight(
            shape=(input_shape[-1], self.num_experts),
            # A tenth of the usual variance, as in Switch Transformers.
            initializer=keras.initializers.VarianceScaling(
                0.1, "fan_in", "truncated_normal"
            ),
            name="gate_kernel",
        )
        self.built = True

    def logits(self, inputs: Tensor) -> Tensor:
        """Computes the logits `(T, E)` of inputs `(T, D)`."""
        return ops.matmul(inputs, self.gate_DE)

    @classmethod
    def weight_shapes(
        cls, width: int, num_experts: int
    ) -> list[tuple[int, ...]]:
        return [(width, num_experts)]


def router_dtype(dtype: str | keras.DTypePolicy | None) -> str:
    """Returns float64 for a float64 policy, float32 for any other."""
    policy = keras.dtype_policies.get(dtype or keras.config.dtype_policy())
    return "float64" if policy.compute_dtype == "float64" else "float32"
