"""Routers of softmax top-k gating without noise, such as Switch."""

import keras

from moe_tf import losses
from moe_tf import top_k
from moe_tf.routing import gating
from moe_tf.routing import router
from moe_tf.types import Tensor


@keras.saving.register_keras_serializable(package="moe_tf")
class SoftmaxTopKRouter(router.GateRouter):
    """Chooses the `k` experts with the largest softmax values.

    The values of the chosen experts are divided by their sum: equations 3 and
    5 without the noise, the gating of Mixtral. The load loss is
    `losses.load_balance_loss`, the balance loss of GShard and Switch less its
    value at perfect balance. With `k = 1` every gate value is 1 and the
    router gets no gradient from the task: use `SwitchRouter`.

    If a token holds NaN or infinity, its gate values and the losses of its
    batch are NaN.

    Args:
        num_experts: int, `E`.
        k: int, experts kept for each token, `1 <= k <= E`. Defaults to `4`.
        importance_weight: float, weight of the importance loss, equation 7.
            Defaults to `0.0`.
        load_weight: float, weight of the load loss. Defaults to `0.01`.
        z_loss_weight: float, weight of `losses.z_loss`. Defaults to `0.0`.

    Call arguments and returns: those of `Router`.

    Example:

    >>> router = moe_tf.layers.SoftmaxTopKRouter(num_experts=4, k=2)
    >>> weight_TK = router(np.ones((3, 8), "float32")).gates.weight_TK
    >>> ops.sum(weight_TK, axis=-1).numpy().round(4)
    array([1., 1., 1.], dtype=float32)

    Reference:
     - [Lepikhin et al., 2020](https://arxiv.org/abs/2006.16668), GShard
     - [Jiang et al., 2024](https://arxiv.org/abs/2401.04088), Mixtral
    """

    def __init__(
        self,
        num_experts: int,
        k: int = 4,
        importance_weight: float = 0.0,
        load_weight: float = 0.01,
        z_loss_weight: float = 0.0,
        **kwargs,
    ):
        super().__init__(
            num_experts,
            k,
            importance_weight,
            load_weight,
            z_loss_weight,
            **kwargs,
        )

    def call(self, inputs, mask=None, training=False):
        logits_TE = self.logits(inputs)
        probability_TE = gating.softmax(logits_TE)
        gates = gating.mask_gates(
            self.gates(logits_TE, probability_TE), self.num_experts, mask
        )
        load_E = gating.count_assigned(gates, self.num_experts)
        return self.routing(
            gates,
            mask,
            load_E=load_E,
            logits_TE=logits_TE,
            load_loss=losses.load_balance_loss(probability_TE, load_E, mask),
        )

    def gates(self, logits_TE: Tensor, probability_TE: Tensor) -> gating.Gates:
        """Returns the gates of logits and of their softmax."""
        gates, _ = gating.noisy_top_k(logits_TE, self.k)
        return gates


@keras.saving.register_keras_serializable(package="moe_tf")
class SwitchRouter(SoftmaxTopKRouter):
    """Chooses one expert for each token, weighted by its softmax value.

    The softmax is over all experts, before one is chosen, so that the router
    gets a gradient from the task although `k = 1`.

    Args:
        num_experts: int, `E`.
        k: int, `1`.
        importance_weight, load_weight, z_loss_weight: those of
            `SoftmaxTopKRouter`.

    Call arguments and returns: those of `Router`.

    Example:

    >>> router = moe_tf.layers.SwitchRouter(num_experts=4)
    >>> router(np.ones((3, 8), "float32")).gates.expert_TK.shape
    TensorShape([3, 1])

    Reference:
     - [Fedus et al., 2021](https://arxiv.org/abs/2101.03961), Switch
       Transformers
    """

    def __init__(
        self,
        num_experts: int,
        k: int = 1,
        importance_weight: float = 0.0,
        load_weight: float = 0.01,
        z_loss_weight: float = 0.0,
        **kwargs,
    ):
        if k != 1:
            raise ValueError(
                "`k` must be 1 with the router `switch`; `softmax_top_k` "
                f"takes more. Received: k={k}"
            )
        super().__init__(
            num_experts,
            k,
            importance_weight,
            load_weight,
            z_loss_weight,
            **kwargs,
        )

    def gates(self, logits_TE: Tensor, probability_TE: Tensor) -> gating.Gates:
        _, expert_TK = gating.top_k_and_next(logits_TE, 1)
        return gating.Gates(
            top_k.take_entries(probability_TE, expert_TK), expert_TK
        )
