"""Strictly balanced gating, appendix F, and expert choice: its descendant."""

import keras

from moe_tf import gating
from moe_tf.layers import column_router
from moe_tf.layers import router


@keras.saving.register_keras_serializable(package="moe_tf")
class BatchwiseRouter(column_router.ThresholdRouter, router.GateRouter):
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
            threshold_weight=threshold_weight,
            **kwargs,
        )

    def build(self, input_shape):
        super().build(input_shape)
        self.threshold_E = self.add_thresholds(
            (self.num_experts,), "thresholds"
        )

    def call(self, inputs, mask=None, training=False):
        logits_TE = self.logits(inputs)
        score_TE = gating.softmax(logits_TE)
        if training:
            chosen_TE = self.take(logits_TE, mask)
        else:
            chosen_TE = column_router.passes(score_TE, self.threshold_E)
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
        if not training:
            return None
        return column_router.share(num_tokens, self.k, self.num_experts)


@keras.saving.register_keras_serializable(package="moe_tf")
class ExpertChoiceRouter(column_router.ColumnRouter, router.GateRouter):
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
        return column_router.share(num_tokens, self.k, self.num_experts)
