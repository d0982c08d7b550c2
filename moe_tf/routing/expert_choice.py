"""Routers in which experts choose tokens: their base, and expert choice."""

import keras
from keras import ops

from moe_tf import sharding
from moe_tf import xla
from moe_tf.dispatch import capacity
from moe_tf.dispatch import token_groups
from moe_tf.routing import gating
from moe_tf.routing import router


class ExpertChoiceBase(router.Router):
    """Every expert takes the tokens with the largest gate values."""

    chooses_in_groups = True

    def __init__(self, *args, load_weight=None, **kwargs):
        if load_weight is not None:
            raise ValueError(
                "`load_weight` has no meaning where every expert gets the "
                f"same load; leave it out. Received: load_weight={load_weight}"
            )
        super().__init__(*args, **kwargs)

    def take(self, logits_TE, mask_T):
        """Equation 18 with `m = ceil(k |X| / n)`, over unmasked tokens.

        Where there are groups of tokens, in each of them.
        """
        score_TE = log_softmax(logits_TE)
        if self.num_groups not in (None, 1):
            return self._take_in_groups(score_TE, mask_T)
        num_tokens, num_experts = ops.shape(score_TE)
        most = tokens_per_expert(num_tokens, self.k, num_experts)
        num_chosen = tokens_per_expert(
            number_real(mask_T, num_tokens), self.k, num_experts
        )
        return gating.batchwise_mask(score_TE, num_chosen, most, mask_T)

    def _take_in_groups(self, score_TE, mask_T):
        score_GTE, mask_GT = (
            token_groups.split_tokens(tensor, self.num_groups)
            for tensor in (score_TE, mask_T)
        )
        number_G = number_real(mask_GT, ops.shape(score_GTE)[1])
        chosen_GTE = gating.group_mask(
            score_GTE,
            tokens_per_expert(number_G, self.k, score_TE.shape[-1]),
            mask_GT,
        )
        return ops.reshape(chosen_GTE, ops.shape(score_TE))

    def gates(self, weight_TE, chosen_TE, mask_T):
        """`Gates` of dense tables; their columns fit the busiest token."""
        if mask_T is not None:
            chosen_TE = ops.logical_and(chosen_TE, mask_T[:, None])
        most = chosen_TE.shape[-1]
        static = xla.wants_static_shapes() or sharding.axes() is not None
        if self.num_groups in (None, 1) and not static:
            number_T = ops.sum(ops.cast(chosen_TE, "int32"), axis=-1)
            most = ops.max(number_T, initial=1)
        return gating.of_chosen(weight_TE, chosen_TE, most)

    def get_config(self):
        config = super().get_config()
        del config["load_weight"]
        return config


@keras.saving.register_keras_serializable(package="moe_tf")
class ExpertChoiceRouter(ExpertChoiceBase, router.GateRouter):
    """Every expert chooses its tokens, in training and at inference.

    Each of the `n` experts takes the `ceil(k T / n)` tokens with its largest
    softmax values, which are the gate values. The load is equal without any
    loss; a token may have any number of experts. Its output depends on the
    batch around it, at inference too: where that must not be, as in serving
    single sentences or in a decoder, use another router.

    A token that holds NaN or infinity goes to every expert, gets NaN for its
    gates and makes the losses of its batch NaN.

    Args:
        num_experts: int, `E`.
        k: int, mean number of experts of a token. Defaults to `4`.
        importance_weight: float, weight of the importance loss, equation 7.
            Defaults to `0.0`.
        z_loss_weight: float, weight of `losses.z_loss`. Defaults to `0.0`.

    Call arguments and returns: those of `Router`.

    Reference:
     - [Zhou et al., 2022](https://arxiv.org/abs/2202.09368)
    """

    def __init__(
        self,
        num_experts,
        k=4,
        importance_weight=0.0,
        z_loss_weight=0.0,
        **kwargs,
    ):
        super().__init__(
            num_experts,
            k,
            importance_weight,
            z_loss_weight=z_loss_weight,
            **kwargs,
        )

    def call(self, inputs, mask=None, training=False):
        logits_TE = self.logits(inputs)
        score_TE = gating.softmax(logits_TE)
        chosen_TE = self.take(logits_TE, mask)
        return self.routing(
            self.gates(score_TE, chosen_TE, mask),
            mask,
            logits_TE=logits_TE,
        )

    def max_tokens_per_expert(self, num_tokens, training):
        return tokens_per_expert(num_tokens, self.k, self.num_experts)


def log_softmax(logits):
    """The logarithm of the softmax, which does not underflow."""
    return logits - ops.logsumexp(logits, axis=-1, keepdims=True)


def tokens_per_expert(num_tokens, k, num_experts):
    """`m = ceil(k |X| / n)` of equation 18."""
    return capacity.expert_capacity(num_tokens * k, num_experts, 1)


def number_real(mask_T, num_tokens):
    """Number of unmasked tokens; with a mask `(G, T)` of each group."""
    if mask_T is None:
        return num_tokens
    return ops.sum(ops.cast(mask_T, "int32"), axis=-1)
