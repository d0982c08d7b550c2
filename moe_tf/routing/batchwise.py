"""Strictly balanced gating, appendix F."""

import keras
from keras import ops

from moe_tf import checks
from moe_tf import losses
from moe_tf.routing import expert_choice
from moe_tf.routing import gating
from moe_tf.routing import router
from moe_tf.types import Tensor


class ThresholdRouter(expert_choice.ExpertChoiceBase):
    """Base class of routers with learned thresholds, equations 19 and 20.

    Args:
        threshold_weight: float, weight of equation 20.
        *args, **kwargs: those of `ExpertChoiceBase`, or of another base of
            the subclass.
    """

    def __init__(self, *args, threshold_weight: float, **kwargs):
        super().__init__(*args, **kwargs)
        checks.positive("threshold_weight", threshold_weight)
        self.threshold_weight = threshold_weight
        self.loss_weights["threshold_loss"] = threshold_weight

    def add_thresholds(
        self, shape: tuple[int, ...], name: str
    ) -> keras.Variable:
        """Adds thresholds, which start at the mean of a softmax over them.

        Args:
            shape: tuple of ints; the softmax is over the last axis.
            name: str, of the variable.
        """
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


@keras.saving.register_keras_serializable(package="moe_tf")
class BatchwiseRouter(ThresholdRouter, router.GateRouter):
    """Strictly balanced gating: every expert gets the same number of tokens.

    In training each expert chooses the `m = ceil(k |X| / n)` tokens of the
    batch with its largest softmax values (equation 18). A token thus has `k`
    experts on average, perhaps none: then the layer's output is zero. In a
    decoder, later positions thus influence earlier ones in training. At
    inference a token goes to the experts whose value passes their learned
    threshold (equation 19), independent of the rest of the batch. The values
    of the chosen experts are divided by their sum (equation 16). There is no
    noise.

    The thresholds start at `1 / n`, and equation 20 trains them alone. The
    gradient of equation 20 counts tokens, so use an optimizer that scales
    gradients, such as Adam, or a `threshold_weight` that suits the batch. The
    paper gives neither the weight nor the initial values.

    At inference the number of a token's experts is not bounded, and XLA
    reserves slots for every token at every expert. Evaluate without
    `jit_compile`, or bound the slots by `SparseMoE(eval_capacity_factor=...)`.

    A token that holds NaN or infinity goes to every expert. Its gate values
    and the losses of its batch are NaN.

    Args:
        num_experts: int, `E`.
        k: int, mean number of experts of a token. Defaults to `4`.
        importance_weight: float, weight of the importance loss, equation 7.
            The load is equal by construction. Defaults to `0.1`.
        z_loss_weight: float, weight of `losses.z_loss`. Defaults to `0.0`.
        threshold_weight: float, weight of equation 20. Defaults to `0.001`.

    Call arguments and returns: those of `Router`.

    Example:

    >>> router = moe_tf.layers.BatchwiseRouter(num_experts=4, k=2)
    >>> x_TD = np.random.default_rng(0).normal(size=(6, 16))
    >>> routing = router(x_TD.astype("float32"), training=True)
    >>> routing.load_E.numpy()
    array([3., 3., 3., 3.], dtype=float32)

    Reference:
     - [Shazeer et al., 2017](https://arxiv.org/abs/1701.06538), appendix F
    """

    def __init__(
        self,
        num_experts: int,
        k: int = 4,
        importance_weight: float = 0.1,
        z_loss_weight: float = 0.0,
        threshold_weight: float = 0.001,
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

    @classmethod
    def weight_shapes(
        cls, width: int, num_experts: int
    ) -> list[tuple[int, ...]]:
        return [*super().weight_shapes(width, num_experts), (num_experts,)]

    def call(self, inputs, mask=None, training=False):
        logits_TE = self.logits(inputs)
        score_TE = gating.softmax(logits_TE)
        if training:
            chosen_TE = self.choose_tokens(logits_TE, mask)
        else:
            chosen_TE = passes_threshold(score_TE, self.threshold_E)
        return self.routing(
            self.gates(
                gating.softmax_over_chosen(logits_TE, chosen_TE),
                chosen_TE,
                mask,
            ),
            mask,
            logits_TE=logits_TE,
            threshold_loss=losses.batchwise_loss(
                score_TE, self.threshold_E, chosen_TE, mask
            ),
        )

    def max_tokens_per_expert(
        self, num_tokens: int | Tensor, training: bool
    ) -> int | Tensor | None:
        if not training:
            return None
        return expert_choice.tokens_per_expert(
            num_tokens, self.k, self.num_experts
        )


def passes_threshold(score: Tensor, threshold: Tensor) -> Tensor:
    """Compares scores with thresholds, equation 19.

    NaN passes, so that it reaches the outputs and is noticed.
    """
    return ops.logical_or(score > threshold, ops.isnan(score))
