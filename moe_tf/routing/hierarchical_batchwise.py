"""Strictly balanced gating, appendix F, in the two levels of appendix B."""

import keras
import tensorflow as tf
from keras import ops

from moe_tf import losses
from moe_tf import sharding
from moe_tf import xla
from moe_tf.dispatch import token_groups
from moe_tf.routing import batchwise
from moe_tf.routing import expert_choice
from moe_tf.routing import gating
from moe_tf.routing import two_level
from moe_tf.types import Tensor


@keras.saving.register_keras_serializable(package="moe_tf")
class HierarchicalBatchwiseRouter(
    batchwise.ThresholdRouter, two_level.TwoLevelRouter
):
    """Strictly balanced gating of `P` branches, and of `Q` experts in each.

    The paper trains its models of one language pair with this router, but
    does not describe how the two appendices compose. Here each level is a
    gate of appendix F over the tokens that reach the level.

    In training each branch chooses the `m_P = ceil(k |X| / P)` tokens of the
    batch with its largest values of the primary softmax (equation 18). Of
    these `m_P` tokens `X_i`, each expert of the branch chooses the
    `m_Q = ceil(k m_P / Q)` tokens with its largest values of the branch's own
    softmax. Every expert thus gets the same number of tokens, and a token has
    `k * k` experts on average, perhaps none: then the layer's output is zero.

    At inference thresholds choose at both levels (equation 19), independent
    of the rest of the batch. At each level the values of the chosen are
    divided by their sum (equation 16), and the weight of an expert is the
    product of its two values (equation 12). Expert `j` of branch `i` is expert
    `i * Q + j`. There is no noise.

    The thresholds start at `1 / P` and `1 / Q`. The sum of equation 20 over
    the primary gate and all secondary gates, each over its own tokens, trains
    the thresholds alone. See `BatchwiseRouter` on the weight of equation 20,
    and on the slots that XLA reserves at inference.

    In training only the gates of chosen branches are computed. At inference,
    on a mesh and with token groups (`num_groups`), all gates are computed.

    A token that holds NaN or infinity goes to every expert. Its gate values
    and the losses of its batch are NaN.

    Args:
        branching: pair of ints `(P, Q)`, branches and experts in each branch.
        k: int, mean number of choices at each level, at most `P` and at most
            `Q`. Defaults to `2`.
        importance_weight: float, weight of the importance loss over all
            `P * Q` experts, equations 7 and 13. The load is equal by
            construction. Defaults to `0.1`.
        threshold_weight: float, weight of equation 20. Defaults to `0.001`.

    Call arguments and returns: those of `Router`; `num_experts` is `P * Q`.

    Example:

    >>> router = moe_tf.layers.HierarchicalBatchwiseRouter((2, 2), k=1)
    >>> x_TD = np.random.default_rng(0).normal(size=(8, 16))
    >>> router(x_TD.astype("float32"), training=True).load_E.numpy()
    array([2., 2., 2., 2.], dtype=float32)

    Reference:
     - [Shazeer et al., 2017](https://arxiv.org/abs/1701.06538), appendices B
       and F
    """

    def __init__(
        self,
        branching: tuple[int, int],
        k: int = 2,
        importance_weight: float = 0.1,
        threshold_weight: float = 0.001,
        **kwargs,
    ):
        super().__init__(
            branching,
            k,
            importance_weight=importance_weight,
            threshold_weight=threshold_weight,
            **kwargs,
        )

    def build(self, input_shape):
        num_branches, branch_size = self.branching
        width = input_shape[-1]
        self.primary_gate_DP = self.add_weight(
            shape=(width, num_branches),
            initializer=_small(input_axes=[0], output_axes=[1]),
            name="primary_gate_kernel",
        )
        self.secondary_gate_PDQ = self.add_weight(
            shape=(num_branches, width, branch_size),
            initializer=_small(input_axes=[1], output_axes=[2]),
            name="secondary_gate_kernel",
        )
        self.threshold_P = self.add_thresholds(
            (num_branches,), "primary_thresholds"
        )
        self.threshold_PQ = self.add_thresholds(
            (num_branches, branch_size), "secondary_thresholds"
        )
        self.built = True

    @classmethod
    def weight_shapes(
        cls, width: int, branching: tuple[int, int]
    ) -> list[tuple[int, ...]]:
        num_branches, branch_size = branching
        return [
            *super().weight_shapes(width, branching),
            (num_branches,),
            (num_branches, branch_size),
        ]

    def call(self, inputs, mask=None, training=False):
        logits_TP = ops.matmul(inputs, self.primary_gate_DP)
        score_TP = gating.softmax(logits_TP)
        if training:
            chosen_TP = self.choose_tokens(logits_TP, mask)
        else:
            chosen_TP = batchwise.passes_threshold(score_TP, self.threshold_P)
        if mask is not None:
            chosen_TP = ops.logical_and(chosen_TP, mask[:, None])
        primary_loss = losses.batchwise_loss(
            score_TP, self.threshold_P, chosen_TP, mask
        )
        is_one_group = self.num_groups in (None, 1) and sharding.axes() is None
        if training and is_one_group:
            within = self._within_chosen(inputs, chosen_TP, mask)
        else:
            within = self._within_all(inputs, chosen_TP, mask, training)
        weight_TPQ, chosen_TPQ, secondary_loss = within

        weight_TP = gating.softmax_over_chosen(logits_TP, chosen_TP)
        flat = (-1, self.num_experts)
        gates = self.gates(
            ops.reshape(weight_TP[..., None] * weight_TPQ, flat),
            ops.reshape(chosen_TPQ, flat),
            mask,
        )
        return self.routing(
            gates, mask, threshold_loss=primary_loss + secondary_loss
        )

    def _within_all(self, x_TD, chosen_TP, mask_T, training):
        """Chooses experts in the chosen branches, from all secondary gates.

        Returns:
            `(weight_TPQ, chosen_TPQ, loss)`: the gate values, whether an
            expert is chosen, and equation 20 summed over all branches.
        """
        logits_TPQ = two_level.matmul_of_all_branches(
            x_TD, self.secondary_gate_PDQ
        )
        score_TPQ = gating.softmax(logits_TPQ)
        if training:
            chosen_TPQ = self._choose_tokens_within(
                logits_TPQ, chosen_TP, mask_T
            )
        else:
            chosen_TPQ = ops.logical_and(
                batchwise.passes_threshold(score_TPQ, self.threshold_PQ),
                chosen_TP[..., None],
            )
        loss = losses.batchwise_loss(
            score_TPQ, self.threshold_PQ, chosen_TPQ, chosen_TP
        )
        return (
            gating.softmax_over_chosen(logits_TPQ, chosen_TPQ),
            chosen_TPQ,
            loss,
        )

    def _choose_tokens_within(self, logits_TPQ, chosen_TP, mask_T):
        score_TPQ = ops.where(
            chosen_TP[..., None],
            expert_choice.log_softmax(logits_TPQ),
            -float("inf"),
        )
        score_GTE, mask_GT = (
            token_groups.split_tokens(tensor, self.num_groups or 1)
            for tensor in (
                ops.reshape(score_TPQ, (-1, self.num_experts)),
                mask_T,
            )
        )
        count_G = expert_choice.num_real_tokens(
            mask_GT, ops.shape(score_GTE)[1]
        )
        num_chosen_G = self._tokens_per_expert(count_G)
        chosen_GTE = gating.batchwise_mask_in_groups(score_GTE, num_chosen_G)
        return ops.reshape(chosen_GTE, ops.shape(score_TPQ))

    def _within_chosen(self, x_TD, chosen_TP, mask_T):
        """Does the same as `_within_all`, from the gates of chosen branches."""
        num_branches, branch_size = self.branching
        num_tokens = ops.shape(x_TD)[0]
        max_tokens = expert_choice.tokens_per_expert(
            num_tokens, self.k, num_branches
        )
        count = expert_choice.tokens_per_expert(
            expert_choice.num_real_tokens(mask_T, num_tokens),
            self.k,
            num_branches,
        )
        ones_TP = ops.ones(ops.shape(chosen_TP), x_TD.dtype)
        branch_TK = self.gates(ones_TP, chosen_TP, mask_T).expert_TK
        logits_SQ, plan = two_level.matmul_of_chosen_branches(
            x_TD, branch_TK, self.secondary_gate_PDQ, max_tokens
        )
        # Each branch has `count` tokens; XLA reserves `max_tokens` slots.
        slots = max_tokens if xla.wants_static_shapes() else count
        token_S = ops.cast(plan.token_S, "int32")
        token_PC = ops.reshape(
            token_S[: num_branches * slots], (num_branches, slots)
        )
        logits_PCQ = ops.reshape(
            logits_SQ[: num_branches * slots],
            (num_branches, slots, branch_size),
        )
        taken_PC = ops.broadcast_to(
            ops.arange(slots, dtype="int32") < count, (num_branches, slots)
        )
        chosen_PCQ = gating.batchwise_mask_in_groups(
            expert_choice.log_softmax(logits_PCQ),
            expert_choice.tokens_per_expert(count, self.k, branch_size),
            taken_PC,
        )
        loss = losses.batchwise_loss(
            gating.softmax(logits_PCQ),
            self.threshold_PQ[:, None],
            chosen_PCQ,
            taken_PC,
        )
        weight_TPQ = _by_token(
            gating.softmax_over_chosen(logits_PCQ, chosen_PCQ),
            token_PC,
            num_tokens,
        )
        chosen_TPQ = _by_token(
            ops.cast(chosen_PCQ, "int32"), token_PC, num_tokens
        )
        return weight_TPQ, chosen_TPQ > 0, loss

    def _tokens_per_expert(self, num_tokens):
        for num_choosers in self.branching:
            num_tokens = expert_choice.tokens_per_expert(
                num_tokens, self.k, num_choosers
            )
        return num_tokens

    def max_tokens_per_expert(
        self, num_tokens: int | Tensor, training: bool
    ) -> int | Tensor | None:
        return self._tokens_per_expert(num_tokens) if training else None


def _small(**axes):
    """Initializer near zero: at zero all tokens would tie."""
    return keras.initializers.VarianceScaling(
        0.1, "fan_in", "truncated_normal", **axes
    )


def _by_token(value_PCQ, token_PC, num_tokens):
    """Scatters slots to tokens: `(T, P, Q)`, zeros where there is no slot.

    No branch has a token twice. Empty slots must hold zeros.
    """
    num_branches, slots, branch_size = ops.shape(value_PCQ)
    branch_PC = ops.broadcast_to(
        ops.arange(num_branches, dtype="int32")[:, None], (num_branches, slots)
    )
    token_PC = ops.minimum(token_PC, num_tokens - 1)
    return tf.scatter_nd(
        ops.stack([token_PC, branch_PC], axis=-1),
        value_PCQ,
        (num_tokens, num_branches, branch_size),
    )
