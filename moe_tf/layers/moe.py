"""The sparsely-gated mixture-of-experts layer."""

import math

import keras
import tensorflow as tf
from keras import ops
from tensorflow.python.ops import control_flow_util

from moe_tf import checks
from moe_tf import dispatch
from moe_tf import gating
from moe_tf import metrics
from moe_tf.layers import experts
from moe_tf.layers import router


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
    tokens while training, the earlier ones first; what overflows is left out
    of the sum and counted. Evaluation never drops.

    In training the layer adds the paper's importance and load losses, over
    the whole batch and already weighted: once for each call, also while its
    weights are frozen. They and the four numbers of `metrics.ExpertBalance`
    are taken over unmasked tokens. The numbers show in the logs of `fit` and
    `evaluate` under the layer's name, so layers of one model need different
    names; every call counts, those of `predict` too, and `layer.balance`
    holds the vectors of the last one.

    Args:
        num_experts: int, `E`.
        hidden_units: int, width of each expert's hidden layer.
        k: int, experts for each token, `1 <= k <= E`. Defaults to `4`.
        activation: name or function inside the experts. Defaults to
            `"relu"`.
        importance_weight: float, weight of the importance loss, equation 7.
            Defaults to `0.1`.
        load_weight: float, weight of the load loss, equation 11. Defaults
            to `0.1`.
        capacity_factor: optional float above 0. Defaults to `None`: nothing
            is dropped.
        seed: optional int for the gate's noise.

    Call arguments:
        inputs: float `(..., D)`.
        mask: optional bool of the leading axes; `False` marks tokens that are
            not routed, give zeros and count nowhere, whatever they hold.
        training: bool.

    Returns:
        float `(..., D)` of the layer's compute dtype. The router works in
        float32 (float64 under a float64 policy).

    Reference:
     - [Shazeer et al., 2017](https://arxiv.org/abs/1701.06538), section 2
    """

    def __init__(
        self,
        num_experts,
        hidden_units,
        k=4,
        *,
        activation="relu",
        importance_weight=0.1,
        load_weight=0.1,
        capacity_factor=None,
        seed=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        checks.positive("capacity_factor", capacity_factor, none_is_fine=True)
        self.capacity_factor = capacity_factor
        self.router = router.NoisyTopKRouter(
            num_experts,
            k,
            importance_weight=importance_weight,
            load_weight=load_weight,
            seed=seed,
            dtype=self.dtype_policy,
            name="router",
        )
        self.experts = experts.Experts(
            num_experts,
            hidden_units,
            activation=activation,
            dtype=self.dtype_policy,
            name="experts",
        )
        self.balance = metrics.ExpertBalance(num_experts, name=self.name)
        self.supports_masking = True

    @property
    def num_experts(self):
        return self.experts.num_experts

    @property
    def k(self):
        return self.router.k

    def build(self, input_shape):
        if input_shape[-1] is None:
            raise ValueError(
                "The last axis of the inputs must have a known size. "
                f"Received: input_shape={input_shape}"
            )
        for layer in (self.router, self.experts):
            layer.build((None, input_shape[-1]))
        self.built = True

    def call(self, inputs, mask=None, training=False):
        shape = ops.shape(inputs)
        inputs = ops.cast(inputs, self.compute_dtype)  # integers too
        x_TD = ops.reshape(inputs, (-1, inputs.shape[-1]))
        mask_T = None
        if mask is not None:
            _check_mask(mask, inputs)
            mask_T = ops.reshape(ops.cast(mask, "bool"), (-1,))
            # A masked token may hold anything, NaN included.
            x_TD = ops.where(mask_T[:, None], x_TD, ops.zeros_like(x_TD))
        routing = self.router(
            ops.cast(x_TD, self.router.dtype), mask=mask_T, training=training
        )
        weight_TK, expert_TK = routing.gates
        plan = self._plan(expert_TK, training)
        y_SD = self.experts(dispatch.dispatch(x_TD, plan), plan=plan)
        y_TD = dispatch.combine(y_SD, ops.cast(weight_TK, y_SD.dtype), plan)
        self.balance.update_state(
            routing.importance_E,
            routing.load_E,
            gating.assigned(routing.gates, self.num_experts),
            dispatch.dropped(plan, expert_TK),
        )
        return ops.reshape(y_TD, shape)

    def _plan(self, expert_TK, training):
        if self.capacity_factor is not None and training:
            return dispatch.plan_capacity(
                expert_TK, self.num_experts, self.capacity_factor
            )
        if _compiled_by_xla():
            # Shapes may not depend on the routing. Blocks of half the mean
            # load are at most half as many slots again as assignments.
            num_assignments = math.prod(ops.shape(expert_TK))
            block_size = num_assignments // (2 * self.num_experts) + 1
            return dispatch.plan_blocks(expert_TK, self.num_experts, block_size)
        return dispatch.plan_rows(expert_TK, self.num_experts)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            "hidden_units": self.experts.hidden_units,
            "k": self.k,
            "activation": keras.activations.serialize(self.experts.activation),
            "importance_weight": self.router.importance_weight,
            "load_weight": self.router.load_weight,
            "capacity_factor": self.capacity_factor,
            "seed": self.router.seed,
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


def _compiled_by_xla():
    """Whether this trace ends in XLA, which wants static shapes.

    TensorFlow's own loops ask the same question this way; there is no public
    one. The answer is that of the trace: a `tf.function` traced outside XLA
    and called inside it later does not compile.
    """
    graph = tf.compat.v1.get_default_graph()
    return control_flow_util.GraphOrParentsInXlaContext(graph)
