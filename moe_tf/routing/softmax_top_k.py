"""Routers that take the largest entries of a softmax, without noise."""

import keras

from moe_tf import losses
from moe_tf import top_k
from moe_tf.routing import gating
from moe_tf.routing import router


@keras.saving.register_keras_serializable(package="moe_tf")
class SoftmaxTopKRouter(router.GateRouter):
    """The `k` largest entries of a softmax, divided by their sum.

    Equations 3 and 5 without the noise; the gating of Mixtral. In training
    the load loss is `losses.load_balance_loss`, the balance loss of GShard and
    Switch, less its value at perfect balance. With `k = 1` every gate value
    is 1 and the task gives the router no gradient: use `SwitchRouter`.

    A token that holds NaN or infinity gets NaN for its gates, and makes the
    losses of its batch NaN.

    Args:
        num_experts: int, `E`.
        k: int, experts kept for each token, `1 <= k <= E`. Defaults to `4`.
        importance_weight: float, weight of the importance loss, equation 7.
            Defaults to `0.0`.
        load_weight: float, weight of the load loss. Defaults to `0.01`.
        z_loss_weight: float, weight of `losses.z_loss`. Defaults to `0.0`.

    Call arguments and returns: those of `Router`.

    Reference:
     - [Lepikhin et al., 2020](https://arxiv.org/abs/2006.16668), GShard
     - [Jiang et al., 2024](https://arxiv.org/abs/2401.04088), Mixtral
    """

    def __init__(
        self,
        num_experts,
        k=4,
        importance_weight=0.0,
        load_weight=0.01,
        z_loss_weight=0.0,
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

    def gates(self, logits_TE, probability_TE):
        gates, _ = gating.noisy_top_k(logits_TE, self.k)
        return gates


@keras.saving.register_keras_serializable(package="moe_tf")
class SwitchRouter(SoftmaxTopKRouter):
    """One expert for each token; its gate value is its softmax over all.

    The value is taken before the selection, so that the task loss reaches
    the router although `k = 1`.

    Args:
        num_experts: int, `E`.
        k: int, `1`.
        importance_weight, load_weight, z_loss_weight: those of
            `SoftmaxTopKRouter`.

    Call arguments and returns: those of `Router`.

    Reference:
     - [Fedus et al., 2021](https://arxiv.org/abs/2101.03961), Switch
       Transformers
    """

    def __init__(
        self,
        num_experts,
        k=1,
        importance_weight=0.0,
        load_weight=0.01,
        z_loss_weight=0.0,
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

    def gates(self, logits_TE, probability_TE):
        _, expert_TK = gating.top_k_and_next(logits_TE, 1)
        return gating.Gates(
            top_k.take_entries(probability_TE, expert_TK), expert_TK
        )
