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


@keras.saving.register_keras_serializable(package="moe_tf")
class HierarchicalBatchwiseRouter(
    batchwise.ThresholdRouter, two_level.TwoLevelRouter
):
    """Strictly balanced gating of `P` groups, and of `Q` experts in each.

    The paper trains its models of one language pair with this, but leaves
    open how the two appendices compose. Here each level is a gate of
    appendix F over the tokens that come to it:

    In training each group takes the `m_P = ceil(k |X| / P)` tokens of the
    batch with its largest values of the primary softmax (equation 18). Of
    these `X_i`, `m_P` in every group, each of its experts takes the
    `m_Q = ceil(k m_P / Q)` with its largest values of the group's own
    softmax. So every expert gets the same number of tokens, and a token goes
    to `k * k` experts on average, perhaps to none: then the layer's output is
    zero. Otherwise thresholds choose at both levels (equation 19), whatever
    else is in the batch. At each level the chosen values are divided by their
    sum (equation 16), and an expert's weight is the product of its two
    (equation 12). Expert `j` of group `i` is expert `i * Q + j`. There is no
    noise.

    The thresholds start at `1 / P` and `1 / Q`. The sum of equation 20 over
    the primary gate and all secondary ones, each over its own tokens, trains
    them, and only them; see `BatchwiseRouter` on its weight, and on what XLA
    reserves outside training.

    In training only the gates of chosen groups are computed; at inference,
    on a mesh and with groups of tokens (`num_groups`), all are.

    A token that holds NaN or infinity goes to every expert, gets NaN for its
    gates and makes the losses of its batch NaN.

    Args:
        branching: pair of ints `(P, Q)`, groups and experts in each group.
        k: int, mean number of choices at each level, at most `P` and at most
            `Q`. Defaults to `2`.
        importance_weight: float, weight of the importance loss over all
            `P * Q` experts, equations 7 and 13. The load is equal by
            construction. Defaults to `0.1`.
        threshold_weight: float, weight of equation 20. Defaults to `0.001`.

    Call arguments and returns: those of `Router`; `num_experts` is `P * Q`.

    Reference:
     - [Shazeer et al., 2017](https://arxiv.org/abs/1701.06538), appendices B
       and F
    """

    def __init__(
        self,
        branching,
        k=2,
        importance_weight=0.1,
        threshold_weight=0.001,
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
        num_groups, group_size = self.branching
        width = input_shape[-1]
        self.primary_gate_DP = self.add_weight(
            shape=(width, num_groups),
            initializer=_small(input_axes=[0], output_axes=[1]),
            name="primary_gate_kernel",
        )
        self.secondary_gate_PDQ = self.add_weight(
            shape=(num_groups, width, group_size),
            initializer=_small(input_axes=[1], output_axes=[2]),
            name="secondary_gate_kernel",
        )
        self.threshold_P = self.add_thresholds(
            (num_groups,), "primary_thresholds"
        )
        self.threshold_PQ = self.add_thresholds(
            (num_groups, group_size), "secondary_thresholds"
        )
        self.built = True

    def call(self, inputs, mask=None, training=False):
        logits_TP = ops.matmul(inputs, self.primary_gate_DP)
        score_TP = gating.softmax(logits_TP)
        if training:
            chosen_TP = self.take(logits_TP, mask)
        else:
            chosen_TP = batchwise.passes(score_TP, self.threshold_P)
        if mask is not None:
            chosen_TP = ops.logical_and(chosen_TP, mask[:, None])
        primary_loss = losses.batchwise_loss(
            score_TP, self.threshold_P, chosen_TP, mask
        )
        one_group = self.num_groups in (None, 1) and sharding.axes() is None
        if training and one_group:
            within = self._within_chosen(inputs, chosen_TP, mask)
        else:
            within = self._within_all(inputs, chosen_TP, mask, training)
        weight_TPQ, chosen_TPQ, secondary_loss = within

        weight_TP = gating.renormalised(logits_TP, chosen_TP)
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
        """The secondary gates, all of them for every token.

        Returns:
            `(weight_TPQ, chosen_TPQ, loss)`: the gate values and which
            experts are chosen, and equation 20 over all groups.
        """
        logits_TPQ = two_level.of_all(x_TD, self.secondary_gate_PDQ)
        score_TPQ = gating.softmax(logits_TPQ)
        if training:
            chosen_TPQ = self._take_within(logits_TPQ, chosen_TP, mask_T)
        else:
            chosen_TPQ = ops.logical_and(
                batchwise.passes(score_TPQ, self.threshold_PQ),
                chosen_TP[..., None],
            )
        loss = losses.batchwise_loss(
            score_TPQ, self.threshold_PQ, chosen_TPQ, chosen_TP
        )
        return gating.renormalised(logits_TPQ, chosen_TPQ), chosen_TPQ, loss

    def _take_within(self, logits_TPQ, chosen_TP, mask_T):
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
        number_G = expert_choice.number_real(mask_GT, ops.shape(score_GTE)[1])
        most_G = self._tokens_an_expert(number_G)
        chosen_GTE = gating.group_mask(score_GTE, most_G)
        return ops.reshape(chosen_GTE, ops.shape(score_TPQ))

    def _within_chosen(self, x_TD, chosen_TP, mask_T):
        """What `_within_all` gives, from the gates of chosen groups alone."""
        num_groups, group_size = self.branching
        num_tokens = ops.shape(x_TD)[0]
        most = expert_choice.tokens_per_expert(num_tokens, self.k, num_groups)
        number = expert_choice.tokens_per_expert(
            expert_choice.number_real(mask_T, num_tokens), self.k, num_groups
        )
        ones_TP = ops.ones(ops.shape(chosen_TP), x_TD.dtype)
        group_TK = self.gates(ones_TP, chosen_TP, mask_T).expert_TK
        logits_SQ, plan = two_level.of_chosen(
            x_TD, group_TK, self.secondary_gate_PDQ, most
        )
        # Each group has `number` tokens; XLA reserves slots for `most`.
        slots = most if xla.wants_static_shapes() else number
        token_S = ops.cast(plan.token_S, "int32")
        token_PC = ops.reshape(
            token_S[: num_groups * slots], (num_groups, slots)
        )
        logits_PCQ = ops.reshape(
            logits_SQ[: num_groups * slots], (num_groups, slots, group_size)
        )
        taken_PC = ops.broadcast_to(
            ops.arange(slots, dtype="int32") < number, (num_groups, slots)
        )
        chosen_PCQ = gating.group_mask(
            expert_choice.log_softmax(logits_PCQ),
            expert_choice.tokens_per_expert(number, self.k, group_size),
            taken_PC,
        )
        loss = losses.batchwise_loss(
            gating.softmax(logits_PCQ),
            self.threshold_PQ[:, None],
            chosen_PCQ,
            taken_PC,
        )
        weight_TPQ = _by_token(
            gating.renormalised(logits_PCQ, chosen_PCQ), token_PC, num_tokens
        )
        chosen_TPQ = _by_token(
            ops.cast(chosen_PCQ, "int32"), token_PC, num_tokens
        )
        return weight_TPQ, chosen_TPQ > 0, loss

    def _tokens_an_expert(self, num_tokens):
        for number in self.branching:
            num_tokens = expert_choice.tokens_per_expert(
                num_tokens, self.k, number
            )
        return num_tokens

    def max_tokens_per_expert(self, num_tokens, training):
        return self._tokens_an_expert(num_tokens) if training else None


def _small(**axes):
    """As of a `GateRouter`: near zero, where all tokens would tie."""
    return keras.initializers.VarianceScaling(
        0.1, "fan_in", "truncated_normal", **axes
    )


def _by_token(value_PCQ, token_PC, num_tokens):
    """The values of each token in each group, `(T, P, Q)`; zeros elsewhere.

    No group has a token twice. Empty slots, whose token is none, hold zeros.
    """
    num_groups, slots, group_size = ops.shape(value_PCQ)
    group_PC = ops.broadcast_to(
        ops.arange(num_groups, dtype="int32")[:, None], (num_groups, slots)
    )
    token_PC = ops.minimum(token_PC, num_tokens - 1)
    return tf.scatter_nd(
        ops.stack([token_PC, group_PC], axis=-1),
        value_PCQ,
        (num_tokens, num_groups, group_size),
    )
