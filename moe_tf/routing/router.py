"""What every router has in common: the interface that `SparseMoE` uses."""

import typing

import keras
from keras import ops

from moe_tf import checks
from moe_tf import losses as balance_losses
from moe_tf.routing import gating


class Routing(typing.NamedTuple):
    """What a router returns for `T` tokens.

    Attributes:
        gates: `gating.Gates`, the chosen experts and their weights.
        importance_E: float, sum of each expert's gate values, equation 6.
        load_E: float, how many tokens each expert is expected to receive,
            equation 10; without noise, how many it receives.
        losses: dictionary of float scalars, the router's losses before their
            weights. Those for balance are 0 at perfect balance.
    """

    gates: gating.Gates
    importance_E: typing.Any
    load_E: typing.Any
    losses: typing.Any


class Router(keras.layers.Layer):
    """Chooses the experts of each token; the base of all routers.

    `SparseMoE` takes any subclass as its `gating`. A subclass decides in
    `call`, which ends in `return self.routing(...)`: that takes the numbers
    of the batch and its losses, which `SparseMoE` adds in training.

        @keras.saving.register_keras_serializable()
        class SignRouter(Router):
            def call(self, inputs, mask=None, training=False):
                expert_TK = ops.cast(inputs[:, :1] > 0, "int32")
                gates = gating.Gates(ops.ones_like(inputs[:, :1]), expert_TK)
                return self.routing(gates, mask)

        SparseMoE(2, 64, gating=SignRouter(2, k=1))

    A loss of its own gets a weight, `self.loss_weights["my_loss"] = 0.1`, and
    its value goes to `routing(..., my_loss=value)`.

    The router's dtype is float32 under every dtype policy except float64;
    `SparseMoE` casts what goes in and what comes out. Masked tokens arrive
    as zeros, and `routing` takes them out of the gates.

    `self.num_groups` is that of its `SparseMoE`: the parts, by order, into
    which tokens are cut for their slots, or `None`. A router whose experts
    choose tokens in each part by itself says `chooses_in_groups = True`.

    Args:
        num_experts: int, `E`.
        k: int, experts for each token, `1 <= k <= E`; their mean number
            where tokens differ.
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
    """

    chooses_in_groups = False

    def __init__(
        self,
        num_experts,
        k,
        importance_weight=0.0,
        load_weight=0.0,
        z_loss_weight=0.0,
        dtype=None,
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
        self.is_taken = False  # by a `SparseMoE`
        self.num_groups = None  # that of its `SparseMoE`
        self.supports_masking = True

    def build(self, input_shape):
        self.built = True

    def routing(
        self,
        gates,
        mask=None,
        *,
        load_E=None,
        logits_TE=None,
        **losses,
    ):
        """The `Routing` of some gates.

        Args:
            gates: `gating.Gates`; experts of another int dtype are cast.
            mask: optional bool `(T,)`, as `call` got it.
            load_E: optional float `(E,)`. Defaults to the number of tokens
                that each expert receives.
            logits_TE: optional float, for the z-loss.
            **losses: float scalars by name. `load_loss` defaults to the
                squared coefficient of variation of `load_E`, equation 11.
        """
        weight_TK, expert_TK = gates
        gates = gating.Gates(weight_TK, ops.cast(expert_TK, "int32"))
        gates = gating.mask_gates(gates, self.num_experts, mask)
        importance_E = gating.importance(gates, self.num_experts)
        if load_E is None:
            load_E = gating.count_assigned(gates, self.num_experts)
        losses.setdefault("load_loss", balance_losses.cv_squared(load_E))
        losses["importance_loss"] = balance_losses.cv_squared(importance_E)
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

    def weighted(self, losses):
        """The losses of a `Routing` that have a weight, times it: a list."""
        return [
            weight * losses[name]
            for name, weight in self.loss_weights.items()
            if weight
        ]

    def max_tokens_per_expert(self, num_tokens, training):
        """The most tokens that any expert gets, where that is known before.

        Args:
            num_tokens: int, `T`, masked ones included; those of a group where
                `chooses_in_groups`.
            training: bool.

        Returns:
            An int, or `None`. Under XLA an expert gets no more slots.
        """
        return None

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
    """A router whose logits are `x W_g`, without noise.

    Without noise equal logits would send every token to the same experts, so
    the kernel starts small, but not at zero.
    """

    def build(self, input_shape):
        self.gate_DE = self.add_weight(
            shape=(input_shape[-1], self.num_experts),
            # A tenth of the variance that layers start with, as in Switch.
            initializer=keras.initializers.VarianceScaling(
                0.1, "fan_in", "truncated_normal"
            ),
            name="gate_kernel",
        )
        self.built = True

    def logits(self, inputs):
        return ops.matmul(inputs, self.gate_DE)


def router_dtype(dtype):
    """float64 under a float64 policy, float32 under any other."""
    policy = keras.dtype_policies.get(dtype or keras.config.dtype_policy())
    return "float64" if policy.compute_dtype == "float64" else "float32"
