"""Strictly balanced gating, appendix F, and expert choice: its descendant."""

import keras
from keras import ops

from moe_tf import checks
from moe_tf import gating
from moe_tf import groups
from moe_tf import plans
from moe_tf import sharding
from moe_tf import xla
from moe_tf.layers import router


class _ByColumn(router.GateRouter):
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
        """Equation 18 with `m = ceil(k |X| / n)`, over unmasked tokens."""
        # By the softmax's logarithm, which does not underflow.
        score_TE = logits_TE - ops.logsumexp(logits_TE, axis=-1, keepdims=True)
        if self.num_groups not in (None, 1):
            return self._take_in_groups(score_TE, mask_T)
        most = self.tokens_an_expert(ops.shape(score_TE)[0])
        num_chosen = most
        if mask_T is not None:
            num_chosen = self.tokens_an_expert(
                ops.sum(ops.cast(mask_T, "int32"))
            )
        return gating.batchwise_mask(score_TE, num_chosen, most, mask_T)

    def _take_in_groups(self, score_TE, mask_T):
        score_GTE, mask_GT = (
            groups.cut(tensor, self.num_groups) for tensor in (score_TE, mask_T)
        )
        number_G = ops.shape(score_GTE)[1]
        if mask_GT is not None:
            number_G = ops.sum(ops.cast(mask_GT, "int32"), axis=1)
        chosen_GTE = gating.group_mask(
            score_GTE, self.tokens_an_expert(number_G), mask_GT
        )
        return ops.reshape(chosen_GTE, ops.shape(score_TE))

    def tokens_an_expert(self, num_tokens):
        return plans.capacity(num_tokens * self.k, self.num_experts, 1)

    def gates(self, weight_TE, chosen_TE, mask_T):
        if mask_T is not None:
            chosen_TE = ops.logical_and(chosen_TE, mask_T[:, None])
        most = self.num_experts
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
class BatchwiseRouter(_ByColumn):
    """Strictly balanced gating: every expert gets the same number of tokens.

    In training each expert takes the `m = ceil(k |X| / n)` tokens of the
    batch with its largest softmax values (equation 18), so a token goes to
    `k` experts on average, perhaps to none: then the layer's output is zero.
    In a decoder later positions thus influence earlier ones in training.
    Otherwise a token goes to the experts whose value passes their learned
    threshold (equation 19), whatever else is in the batch. The chosen values
    are divided by their sum (equation 16). There is no noise.

    The thresholds start at `1 / n`. Equation 20 trains them, and only them;
    its gradient counts tokens, so an optimizer that scales gradients (Adam)
    is expected, or a `threshold_weight` that suits the batch. The paper says
    neither the weight nor the start.

    Outside training the number of a token's experts is not bounded, and XLA
    reserves slots for every token at every expert. Evaluate without
    `jit_compile`, or bound them by `SparseMoE(eval_capacity_factor=...)`.

    A token that holds NaN or infinity goes to every expert, gets NaN for its
    gates and makes the losses of its batch NaN.

    Args:
        num_experts: int, `E`.
        k: int, mean number of experts of a token. Defaults to `4`.
        importance_weight: float, weight of the importance loss, equation 7.
            The load is equal by construction. Defaults to `0.1`.
        z_loss_weight: float, weight of `gating.z_loss`. Defaults to `0.0`.
        threshold_weight: float, weight of equation 20. Defaults to `0.001`.

    Call arguments and returns: those of `Router`.

    Reference:
     - [Shazeer et al., 2017](https://arxiv.org/abs/1701.06538), appendix F
    """

    def __init__(
        self,
        num_experts,
        k=4,
        importance_weight=0.1,
        z_loss_weight=0.0,
        threshold_weight=0.001,
        **kwargs,
    ):
        super().__init__(
            num_experts,
            k,
            importance_weight,
            z_loss_weight=z_loss_weight,
            **kwargs,
        )
        checks.positive("threshold_weight", threshold_weight)
        self.threshold_weight = threshold_weight
        self.loss_weights["threshold_loss"] = threshold_weight

    def build(self, input_shape):
        super().build(input_shape)
        self.threshold_E = self.add_weight(
            shape=(self.num_experts,),
            initializer=keras.initializers.Constant(1.0 / self.num_experts),
            name="thresholds",
        )

    def call(self, inputs, mask=None, training=False):
        logits_TE = self.logits(inputs)
        score_TE = gating.softmax(logits_TE)
        if training:
            chosen_TE = self.take(logits_TE, mask)
        else:
            chosen_TE = ops.logical_or(
                score_TE > self.threshold_E, ops.isnan(score_TE)
            )
        return self.routing(
            self.gates(
                gating.renormalised(logits_TE, chosen_TE), chosen_TE, mask
            ),
            mask,
            logits_TE=logits_TE,
            threshold_loss=gating.batchwise_loss(
                score_TE, self.threshold_E, chosen_TE, mask
            ),
        )

    def most_tokens(self, num_tokens, training):
        return self.tokens_an_expert(num_tokens) if training else None

    def get_config(self):
        return {
            **super().get_config(),
            "threshold_weight": self.threshold_weight,
        }


@keras.saving.register_keras_serializable(package="moe_tf")
class ExpertChoiceRouter(_ByColumn):
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
        z_loss_weight: float, weight of `gating.z_loss`. Defaults to `0.0`.

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

    def most_tokens(self, num_tokens, training):
        return self.tokens_an_expert(num_tokens)
