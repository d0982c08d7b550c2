"""The sparsely-gated mixture-of-experts layer."""

import keras
from keras import ops

from moe_tf import checks
from moe_tf import metrics
from moe_tf import sharding
from moe_tf import xla
from moe_tf.dispatch import capacity
from moe_tf.dispatch import gather
from moe_tf.dispatch import plans
from moe_tf.dispatch import token_groups
from moe_tf.experts import experts
from moe_tf.layers import gate_recording
from moe_tf.routing import registry
from moe_tf.routing import router
from moe_tf.routing import two_level

DROP_POLICIES = ("position", "gate_value")


@keras.saving.register_keras_serializable(package="moe_tf")
class SparseMoE(keras.layers.Layer):
    """Sparsely-gated mixture of experts, `y = sum_i G(x)_i E_i(x)`.

    A router chooses `k` of `num_experts` feed-forward experts for every
    token; only those are computed, so the cost follows `k`, and the number
    of parameters follows `num_experts`.

    By default every chosen expert computes every token routed to it, so a
    token's output does not depend on the rest of its batch. With a
    `capacity_factor` each expert takes at most
    `ceil(capacity_factor * k * T / num_experts)` of the batch's `T` unmasked
    tokens while training; what overflows is left out of the sum and counted.
    Evaluation drops nothing unless `eval_capacity_factor` says so.

    In training the layer adds the router's losses, over the whole batch and
    already weighted: once for each call, also while its weights are frozen.
    They and the numbers of `metrics.ExpertBalance`, the router's losses
    before their weights among these, are taken over unmasked tokens. The
    numbers show in the logs of `fit` and `evaluate` under the layer's name,
    so layers of one model need different names; every call counts, those of
    `predict` too, and `layer.balance` holds the vectors of the last one.

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
            the two-level layer of appendix B, `P` groups of `Q` experts, for
            `"noisy_top_k"` and `"batchwise"`.
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
        num_groups: optional int, into how many groups a batch's tokens are
            cut, by their order; each has a capacity of its own, and experts
            that choose tokens choose in each. On a mesh a multiple of the
            axis `batch`, so that each device routes its own tokens; since
            groups decide what is dropped, results do not depend on the
            devices. Masked tokens fill the last group up. Defaults to `None`:
            one, or on a mesh, where nothing depends on it, as many as the
            axis is long.
        recompute: bool, whether the experts' hidden activations are computed
            again in the backward pass instead of being kept (appendix D).
            Defaults to `False`. Use it instead of Keras's rematerialization:
            `keras.RematScope`, which is refused, and `keras.remat` lose the
            gradients of the losses.
        jit_compile: `"auto"`, or bool: whether the layer is an XLA program
            of its own where the `tf.function` around it is not compiled;
            called eagerly it never is. Without XLA routing alone takes 6 ms
            on an H100; with it, each new number of tokens is compiled, and
            noise of the same seed is other noise. On a mesh it never is.
            Defaults to `"auto"`: on a GPU.
        seed: optional int for the gate's noise, where it has any.

    Call arguments:
        inputs: float `(..., D)`.
        mask: optional bool of the leading axes; `False` marks tokens that are
            not routed, give zeros and count nowhere, whatever they hold.
        training: bool.

    Returns:
        float `(..., D)` of the layer's compute dtype. The router works in
        float32 (float64 under a float64 policy).

    Reference:
     - [Shazeer et al., 2017](https://arxiv.org/abs/1701.06538), section 2,
       appendices A, B, D and F
    """

    def __init__(
        self,
        num_experts,
        hidden_units,
        k=None,
        *,
        gating="noisy_top_k",
        branching=None,
        activation="relu",
        importance_weight=None,
        load_weight=None,
        z_loss_weight=None,
        capacity_factor=None,
        eval_capacity_factor=None,
        drop_policy="position",
        num_groups=None,
        recompute=False,
        jit_compile="auto",
        seed=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        checks.positive("capacity_factor", capacity_factor, none_is_fine=True)
        checks.positive(
            "eval_capacity_factor", eval_capacity_factor, none_is_fine=True
        )
        if drop_policy not in DROP_POLICIES:
            raise ValueError(
                f"`drop_policy` must be one of {', '.join(DROP_POLICIES)}. "
                f"Received: drop_policy={drop_policy}"
            )
        if jit_compile not in ("auto", True, False):
            raise ValueError(
                '`jit_compile` must be `"auto"`, `True` or `False`. '
                f"Received: jit_compile={jit_compile}"
            )
        self.jit_compile = jit_compile
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        self.drop_policy = drop_policy
        checks.at_least("num_groups", num_groups, 1, none_is_fine=True)
        self.num_groups = num_groups
        self._router_config = {
            "gating": gating,
            "branching": branching,
            "k": k,
            "importance_weight": importance_weight,
            "load_weight": load_weight,
            "z_loss_weight": z_loss_weight,
            "seed": seed,
        }
        self.router = registry.make(
            num_experts, dtype=self.dtype_policy, **self._router_config
        )
        self.router.num_groups = num_groups
        self.experts = experts.Experts(
            num_experts,
            hidden_units,
            activation=activation,
            recompute=recompute,
            dtype=self.dtype_policy,
            name="experts",
        )
        numbers = tuple(self.router.loss_weights)
        if self._has_capacity:
            numbers += ("effective_capacity_factor",)
        self.balance = metrics.ExpertBalance(
            num_experts, numbers, name=self.name
        )
        self.supports_masking = True

    @property
    def num_experts(self):
        return self.experts.num_experts

    @property
    def k(self):
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

    def call(self, inputs, mask=None, training=False):
        shape = ops.shape(inputs)
        inputs = ops.cast(inputs, self.compute_dtype)  # integers too
        # The width that it was built for; a signature may leave it open.
        x_TD = ops.reshape(inputs, (-1, self.experts.in_EDF.shape[1]))
        mask_T = None
        if mask is not None:
            _check_mask(mask, inputs)
            mask_T = ops.reshape(ops.cast(mask, "bool"), (-1,))
        num_groups = self._groups(training)
        number = ops.shape(x_TD)[0]
        if num_groups is not None:
            x_TD, mask_T = token_groups.pad(x_TD, mask_T, num_groups)
        mixture = self._mixture
        if xla.compiles_part(self.jit_compile, self.experts.in_EDF):
            mixture = xla.compiled(mixture)
        y_TD, losses, numbers = mixture(x_TD, mask_T, num_groups, training)
        if training:
            for loss in losses:
                self.add_loss(loss)
        self.balance.update_state(**numbers)
        if num_groups is not None and y_TD.shape[0] != number:
            y_TD = sharding.constrain(y_TD, None, None)[:number]
        return ops.reshape(y_TD, shape)

    def _mixture(self, x_TD, mask_T, num_groups, training):
        """The outputs, the weighted losses, what `balance` is told.

        Apart from the noise's seed it changes no state, so that it can be a
        program of its own.
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
                token_groups.split(tensor, num_groups)
                for tensor in (x_TD, weight_TK, expert_TK, mask_T)
            )
        plan = self._plan(weight_TK, expert_TK, mask_T, training)
        x_SD = gather.dispatch(x_TD, plan)
        y_SD = self.experts(x_SD, plan=plan, training=training)
        y_TD = gather.combine(y_SD, ops.cast(weight_TK, y_SD.dtype), plan)
        if num_groups is not None:
            y_TD = ops.reshape(y_TD, (-1, y_TD.shape[-1]))
        numbers = {
            "importance_E": routing.importance_E,
            "load_E": routing.load_E,
            "assigned_E": plan.count_E,
            "dropped_E": plans.dropped(plan),
            **routing.losses,
        }
        if self._has_capacity:
            numbers["effective_capacity_factor"] = plans.effective_capacity(
                plan
            )
        return y_TD, self.router.weighted(routing.losses), numbers

    def _groups(self, training):
        """The number of groups, or `None` where there is one and no mesh."""
        axes = sharding.axes()
        if axes is None:
            return None if self.num_groups in (None, 1) else self.num_groups
        factor = self.capacity_factor if training else self.eval_capacity_factor
        chooses = (
            self.router.max_tokens_per_expert(axes["batch"], training)
            is not None
        )
        if branching := getattr(self.router, "branching", None):
            two_level.warn_of_spread_branches(self.name, branching, axes)
        return token_groups.num_groups(
            self.name, self.num_groups, axes, factor is not None or chooses
        )

    def _plan(self, weight_TK, expert_TK, mask_T, training):
        """A plan of all tokens, or with a first axis `G` of its groups."""
        expert_TK = plans.as_index(expert_TK)
        num_tokens = ops.shape(expert_TK)[-2]
        most = self._max_tokens_per_expert(ops.shape(expert_TK)[:-1], training)
        factor = self.capacity_factor if training else self.eval_capacity_factor
        slots = limit = priority_TK = None
        if factor is not None:
            slots = limit = self._slots(num_tokens, factor)
            if mask_T is not None:
                number = ops.sum(ops.cast(mask_T, "int64"), axis=-1)
                limit = self._slots(number, factor)
            if self.drop_policy == "gate_value":
                priority_TK = weight_TK
        if len(expert_TK.shape) == 3:
            if slots is None:
                slots = num_tokens if most is None else most
            if isinstance(limit, int):
                limit = ops.full((ops.shape(expert_TK)[0],), limit, "int32")
            return token_groups.plan(
                expert_TK, self.num_experts, slots, limit, priority_TK
            )
        block_size = self.experts.block_size(
            num_tokens, self.router.experts_per_token
        )
        if block_size is not None:
            return plans.plan_blocks(
                expert_TK,
                self.num_experts,
                block_size,
                most,
                limit,
                priority_TK,
            )
        if factor is None:
            return plans.plan_dropless(expert_TK, self.num_experts, most)
        return plans.plan_capacity(
            expert_TK, self.num_experts, slots, limit, priority_TK
        )

    def _max_tokens_per_expert(self, sizes, training):
        """The most tokens of any expert, of each group where there are any."""
        *num_groups, num_tokens = sizes
        if not num_groups or self.router.chooses_in_groups:
            return self.router.max_tokens_per_expert(num_tokens, training)
        most = self.router.max_tokens_per_expert(
            num_groups[0] * num_tokens, training
        )
        return None if most is None else ops.minimum(most, num_tokens)

    def _slots(self, num_tokens, factor):
        num_assignments = num_tokens * self.router.experts_per_token
        return capacity.expert_capacity(
            num_assignments, self.num_experts, factor
        )

    def rematerialized_call(self, layer_call, *args, **kwargs):
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
