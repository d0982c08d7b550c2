"""What routers have in common whose experts take tokens, appendix F."""

import keras
from keras import ops

from moe_tf import checks
from moe_tf import gating
from moe_tf import groups
from moe_tf import plans
from moe_tf import sharding
from moe_tf import xla
from moe_tf.layers import router


class ColumnRouter(router.Router):
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
        score_TE = log_share(logits_TE)
        if self.num_groups not in (None, 1):
            return self._take_in_groups(score_TE, mask_T)
        num_tokens, num_experts = ops.shape(score_TE)
        most = share(num_tokens, self.k, num_experts)
        num_chosen = share(number_real(mask_T, num_tokens), self.k, num_experts)
        return gating.batchwise_mask(score_TE, num_chosen, most, mask_T)

    def _take_in_groups(self, score_TE, mask_T):
        score_GTE, mask_GT = (
            groups.cut(tensor, self.num_groups) for tensor in (score_TE, mask_T)
        )
        number_G = number_real(mask_GT, ops.shape(score_GTE)[1])
        chosen_GTE = gating.group_mask(
            score_GTE, share(number_G, self.k, score_TE.shape[-1]), mask_GT
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


class ThresholdRouter(ColumnRouter):
    """A `ColumnRouter` with learned thresholds, equations 19 and 20.

    Args:
        threshold_weight: float, weight of equation 20.
        *args, **kwargs: those of the next class.
    """

    def __init__(self, *args, threshold_weight, **kwargs):
        super().__init__(*args, **kwargs)
        checks.positive("threshold_weight", threshold_weight)
        self.threshold_weight = threshold_weight
        self.loss_weights["threshold_loss"] = threshold_weight

    def add_thresholds(self, shape, name):
        """Thresholds at the mean of a softmax over the last axis."""
        return self.add_weight(
            shape=shape,
            initializer=keras.initializers.Constant(1.0 / shape[-1]),
            name=name,
        )

    def get_config(self):
        return {
            **super().get_config(),
            "threshold_weight": self.threshold_weight,
        }


def passes(score, threshold):
    """Equation 19; what is NaN passes, so that it shows in what follows."""
    return ops.logical_or(score > threshold, ops.isnan(score))


def log_share(logits):
    """The logarithm of the softmax, which does not underflow."""
    return logits - ops.logsumexp(logits, axis=-1, keepdims=True)


def share(num_tokens, k, num_experts):
    """`m = ceil(k |X| / n)` of equation 18."""
    return plans.capacity(num_tokens * k, num_experts, 1)


def number_real(mask_T, num_tokens):
    """Number of unmasked tokens; with a mask `(G, T)` of each group."""
    if mask_T is None:
        return num_tokens
    return ops.sum(ops.cast(mask_T, "int32"), axis=-1)
