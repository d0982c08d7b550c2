"""The sparsely-gated mixture-of-experts layer."""

from collections.abc import Callable

import keras
from keras import ops

from moe_tf import checks
from moe_tf import metrics
from moe_tf import sharding
from moe_tf import xla
from moe_tf.dispatch import choice
from moe_tf.dispatch import token_groups
from moe_tf.experts.experts import Experts
from moe_tf.layers import gate_recording
from moe_tf.routing import registry
from moe_tf.routing import router
from moe_tf.routing import two_level
from moe_tf.types import Activation
from moe_tf.types import Tensor


@keras.saving.register_keras_serializable(package="moe_tf")
class SparseMoE(keras.layers.Layer):
    """Sparsely-gated mixture of experts, `y = sum_i G(x)_i E_i(x)`.

    A router chooses `k` of `num_experts` feed-forward experts for every
    token. Only those are computed, so the cost follows `k`, and the number
    of parameters follows `num_experts`. A call proceeds as follows:

    1. The router gives each token `k` experts and gate values (`routing/`).
    2. A plan assigns tokens to slots of their experts, and drops what
       overflows a capacity; tokens are dispatched to the slots (`dispatch/`).
       On a mesh an all-to-all takes them to the devices of the experts.
    3. The experts compute the tokens in their slots (`experts/`).
    4. The answers come back and are combined, weighted by the gate values.

    By default every chosen expert computes every token routed to it, so a
    token's output does not depend on the rest of its batch. With a
    `capacity_factor` each expert takes at most
    `ceil(capacity_factor * k * T / num_experts)` of the batch's `T` unmasked
    tokens while training. What overflows is left out of the sum and counted.
    Evaluation drops nothing unless `eval_capacity_factor` says so.

    In training each call adds the router's losses, already weighted and taken
    over the whole batch, also while the weights are frozen. The layer's
    metric, `metrics.ExpertBalance`, counts every call, those of `predict`
    too, and shows the losses before their weights. Losses and metric leave
    masked tokens out. The metric's scalars appear in the logs of `fit` and
    `evaluate` under the layer's name, so layers of one model need different
    names. `layer.balance` holds the vectors of the last call.

    Args:
        num_experts: int, `E`.
        hidden_units: int, width of each expert's hidden layer.
        k: optional int, experts for each token, at each level if there are
            two. Defaults to the router's: `4`; `2` with `branching`; `1` with
            `"switch"`.
        gating: `"noisy_top_k"` (the paper's), `"softmax_top_k"`, `"switch"`,
            `"batchwise"` (the paper's strictly balanced gating),
            `"expert_choice"`, or a `Router`, whose settings are then its own.
            Defaults to `"noisy_top_k"`.
        branching: optional pair of ints `(P, Q)` with `P * Q == num_experts`:
            the two-level layer of appendix B, `P` branches of `Q` experts,
            for `"noisy_top_k"` and `"batchwise"`.
        activation: name or function inside the experts. Defaults to
            `"relu"`.
        importance_weight: optional float, weight of the importance loss,
            equation 7. Defaults to the router's, `0.1` for `"noisy_top_k"`.
        load_weight: optional float, weight of the load loss, equation 11.
            Defaults to the router's, `0.1` for `"noisy_top_k"`.
        z_loss_weight: optional float, weight of `losses.z_loss`. Defaults to
            the router's, `0.0`.
        capacity_factor: optional float above 0, for training. Defaults to
            `None`: nothing is dropped.
        eval_capacity_factor: optional float above 0, for inference. Defaults
            to `None`: nothing is dropped.
        drop_policy: which tokens an expert keeps when it is full:
            `"position"`, those that are earlier in the batch, or
            `"gate_value"`, those with larger gate values. Defaults to
            `"position"`.
        num_groups: optional int, number of token groups into which a batch
            is split by order. Each group has a capacity of its own, and
            experts that choose tokens choose in each. On a mesh the number
            must be a multiple of the axis `batch`, so that each device routes
            its own tokens. Groups alone decide what is dropped, so results do
            not depend on the number of devices. Masked tokens fill up the
            last group. Defaults to `None`: one group, or on a mesh, where
            nothing depends on the number, one group a device along `batch`.
        recompute: bool, whether the experts' hidden activations are computed
            again in the backward pass instead of being kept (appendix D).
            Defaults to `False`. Use this instead of Keras's
            rematerialization: `keras.remat` loses the gradients of the
            losses, and `keras.RematScope` is refused for the same reason.
        jit_compile: `"auto"` or bool, whether the layer is compiled by XLA
            as a program of its own where the `tf.function` around it is not
            compiled. Eager calls and calls on a mesh are never compiled.
            Without XLA routing alone takes 6 ms on an H100. With XLA each new
            number of tokens is compiled anew, and the same seed draws other
            noise. Defaults to `"auto"`: on a GPU.
        seed: optional int for the gate's noise, where it has any.

    Call arguments:
        inputs: float `(..., D)`.
        mask: optional bool of the leading axes. Tokens marked `False` are not
            routed, give zeros and count nowhere, whatever they hold.
        training: bool.

    Returns:
        float `(..., D)` of the layer's compute dtype. The router works in
        float32 (float64 under a float64 policy).

    Example:

    >>> layer = moe_tf.SparseMoE(num_experts=8, hidden_units=32, k=2)
    >>> layer(np.ones((2, 5, 16), "float32")).shape
    TensorShape([2, 5, 16])

    Reference:
     - [Shazeer et al., 2017](https://arxiv.org/abs/1701.06538), section 2,
       appendices A, B, D and F
    """

    def __init__(
        self,
        num_experts: int,
        hidden_units: int,
        k: int | None = None,
        *,
        gating: str | router.Router = "noisy_top_k",
        branching: tuple[int, int] | None = None,
        activation: Activation = "relu",
        importance_weight: float | None = None,
        load_weight: float | None = None,
        z_loss_weight: float | None = None,
        capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None,
        drop_policy: str = "position",
        num_groups: int | None = None,
        recompute: bool = False,
        jit_compile: str | bool = "auto",
        seed: int | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        self.drop_policy = drop_policy
        self.num_groups = num_groups
        self.jit_compile = jit_compile
        self._check_settings()
        self._router_config = {
            "gating": gating,
            "branching": branching,
            "k": k,
            "importance_weight": importance_weight,
            "load_weight": load_weight,
            "z_loss_weight": z_loss_weight,
            "seed": seed,
        }
        self.router = registry.make_router(
            num_experts, dtype=self.dtype_policy, **self._router_config
        )
        self.router.num_groups = num_groups
        self.experts = Experts(
            num_experts,
            hidden_units,
            activation=activation,
            recompute=recompute,
            dtype=self.dtype_policy,
            name="experts",
        )
        scalars = tuple(self.router.loss_weights)
        if self._has_capacity:
            scalars += ("effective_capacity_factor",)
        self.balance = metrics.ExpertBalance(
            num_experts, scalars, name=self.name
        )
        self.supports_masking = True

    def _check_settings(self):
        for name in ("capacity_factor", "eval_capacity_factor"):
            checks.positive(name, getattr(self, name), allow_none=True)
        checks.at_least("num_groups", self.num_groups, 1, allow_none=True)
        if self.drop_policy not in choice.DROP_POLICIES:
            raise ValueError(
                "`drop_policy` must be one of "
                f"{', '.join(choice.DROP_POLICIES)}. "
                f"Received: drop_policy={self.drop_policy}"
            )
        if self.jit_compile not in ("auto", True, False):
            raise ValueError(
                '`jit_compile` must be `"auto"`, `True` or `False`. '
                f"Received: jit_compile={self.jit_compile}"
            )

    @property
    def num_experts(self) -> int:
        return self.experts.num_experts

    @property
    def k(self) -> int:
        return self.router.k

    @property
    def _has_capacity(self):
        factors = self.capacity_factor, self.eval_capacity_factor
        return any(factor is not None for factor in factors)

    def build(self, input_shape):
        if input_shape[-1] is None:
            raise ValueError(
                "The last axis of the inputs must have a known size. "
                f"Received: input_shape={input_shape}"
            )
        for layer in (self.router, self.experts):
            if not layer.built:  # a router that was given may be
                layer.build((None, input_shape[-1]))
        self.input_spec = keras.layers.InputSpec(
            min_ndim=1, axes={-1: input_shape[-1]}
        )
        self.built = True

    def call(
        self,
        inputs: Tensor,
        mask: Tensor | None = None,
        training: bool = False,
    ) -> Tensor:
        shape = ops.shape(inputs)
        inputs = ops.cast(inputs, self.compute_dtype)  # integers too
        # The width that it was built for; a signature may leave it open.
        x_TD = ops.reshape(inputs, (-1, self.experts.in_EDF.shape[1]))
        mask_T = None
        if mask is not None:
            _check_mask(mask, inputs)
            mask_T = ops.reshape(ops.cast(mask, "bool"), (-1,))
        num_groups = self._num_token_groups(training)
        num_tokens = ops.shape(x_TD)[0]
        if num_groups is not None:
            x_TD, mask_T = token_groups.pad_tokens(x_TD, mask_T, num_groups)
        mixture = self._mixture
        if xla.compiles_part(self.jit_compile, self.experts.in_EDF):
            mixture = xla.compiled(mixture)
        y_TD, losses, statistics = mixture(x_TD, mask_T, num_groups, training)
        if training:
            for loss in losses:
                self.add_loss(loss)
        self.balance.update_state(**statistics)
        if num_groups is not None and y_TD.shape[0] != num_tokens:
            y_TD = sharding.constrain(y_TD, None, None)[:num_tokens]
        return ops.reshape(y_TD, shape)

    def _mixture(self, x_TD, mask_T, num_groups, training):
        """Routes, dispatches, computes and combines.

        The only state that changes is the seed of the noise, so that this can
        be a program of its own.

        Returns:
            The outputs, the weighted losses, and the arguments of
            `balance.update_state`.
        """
        if mask_T is not None:
            # A masked token may hold anything, NaN included.
            x_TD = ops.where(mask_T[:, None], x_TD, ops.zeros_like(x_TD))
        routing = self.router(
            ops.cast(x_TD, self.router.dtype), mask=mask_T, training=training
        )
        gate_recording.record(self, routing.gates)
        weight_TK, expert_TK = routing.gates
        if num_groups is not None:
            x_TD, weight_TK, expert_TK, mask_T = (
                token_groups.split_tokens(tensor, num_groups)
                for tensor in (x_TD, weight_TK, expert_TK, mask_T)
            )
        plan = self._choose_plan(weight_TK, expert_TK, mask_T, training)
        x_SD = plan.dispatch(x_TD)
        y_SD = self.experts(x_SD, plan=plan, training=training)
        y_TD = plan.combine(y_SD, ops.cast(weight_TK, y_SD.dtype))
        if num_groups is not None:
            y_TD = ops.reshape(y_TD, (-1, y_TD.shape[-1]))
        statistics = {
            "importance_E": routing.importance_E,
            "load_E": routing.load_E,
            "assigned_E": plan.count_E,
            "dropped_E": plan.dropped_E(),
            **routing.losses,
        }
        if self._has_capacity:
            statistics["effective_capacity_factor"] = (
                plan.effective_capacity_factor()
            )
        return y_TD, self.router.weighted(routing.losses), statistics

    def _num_token_groups(self, training):
        """The number of groups, or `None` where there is one and no mesh."""
        axes = sharding.axes()
        if axes is None:
            return None if self.num_groups in (None, 1) else self.num_groups
        if branching := getattr(self.router, "branching", None):
            two_level.warn_of_split_branches(self.name, branching, axes)
        experts_choose = (
            self.router.max_tokens_per_expert(axes["batch"], training)
            is not None
        )
        return token_groups.check_num_groups(
            self.name,
            self.num_groups,
            axes,
            required=experts_choose or self._limit(training) is not None,
        )

    def _limit(self, training):
        factor = self.capacity_factor if training else self.eval_capacity_factor
        if factor is None:
            return None
        return choice.Limit(
            factor, self.router.experts_per_token, self.drop_policy
        )

    def _choose_plan(self, weight_TK, expert_TK, mask_T, training):
        *num_groups, num_tokens, _ = ops.shape(expert_TK)
        block_size = None
        if not num_groups:
            block_size = self.experts.block_size(
                num_tokens, self.router.experts_per_token
            )
        return choice.choose_plan(
            weight_TK,
            expert_TK,
            mask_T,
            self.num_experts,
            limit=self._limit(training),
            max_tokens=self._max_tokens(num_groups, num_tokens, training),
            block_size=block_size,
        )

    def _max_tokens(self, num_groups, num_tokens, training):
        """The most tokens of a group that any expert gets, if known."""
        if not num_groups or self.router.chooses_in_groups:
            return self.router.max_tokens_per_expert(num_tokens, training)
        max_tokens = self.router.max_tokens_per_expert(
            num_groups[0] * num_tokens, training
        )
        return (
            None if max_tokens is None else ops.minimum(max_tokens, num_tokens)
        )

    def rematerialized_call(
        self, layer_call: Callable[..., Tensor], *args, **kwargs
    ) -> Callable[..., Tensor]:
        call = super().rematerialized_call(layer_call, *args, **kwargs)
        if call is not layer_call:
            raise ValueError(
                f"The layer {self.name} adds losses, which lose their "
                "gradients inside `keras.RematScope`. Build it outside, and "
                "pass `recompute=True` to keep no hidden activations."
            )
        return layer_call

    def compute_output_shape(self, input_shape):
        return input_shape

    @classmethod
    def from_config(cls, config):
        if isinstance(config["gating"], dict):
            gating = keras.saving.deserialize_keras_object(config["gating"])
            config = {**config, "gating": gating}
        return super().from_config(config)

    def get_config(self):
        router_config = dict(self._router_config)
        if isinstance(router_config["gating"], router.Router):
            router_config["gating"] = keras.saving.serialize_keras_object(
                self.router
            )
        return {
            **super().get_config(),
            **router_config,
            "num_experts": self.num_experts,
            "hidden_units": self.experts.hidden_units,
            "activation": keras.activations.serialize(self.experts.activation),
            "capacity_factor": self.capacity_factor,
            "eval_capacity_factor": self.eval_capacity_factor,
            "drop_policy": self.drop_policy,
            "num_groups": self.num_groups,
            "recompute": self.experts.recompute,
            "jit_compile": self.jit_compile,
        }


def _check_mask(mask, inputs):
    leading = inputs.shape[:-1]
    if len(mask.shape) != len(leading) or any(
        None not in sizes and sizes[0] != sizes[1]
        for sizes in zip(mask.shape, leading, strict=True)
    ):
        raise ValueError(
            "`mask` must have the shape of the inputs without their last axis. "
            f"Received: mask of shape {tuple(mask.shape)}, inputs of shape "
            f"{tuple(inputs.shape)}"
        )
