"""Expert choice, and the base class of routers in which experts choose."""

import keras
from keras import ops

from moe_tf import sharding
from moe_tf import xla
from moe_tf.dispatch import capacity
from moe_tf.dispatch import token_groups
from moe_tf.routing import gating
from moe_tf.routing import router
from moe_tf.types import Tensor


class ExpertChoiceBase(router.Router):
    """Base class of the routers in which experts choose tokens.

    Every expert chooses the tokens with its largest gate values.

    Args:
        *args, **kwargs: those of `Router` except `load_weight`.
    """

    chooses_in_groups = True

    def __init__(self, *args, load_weight: None = None, **kwargs):
        if load_weight is not None:
            raise ValueError(
                "`load_weight` has no meaning where every expert gets the "
                f"same load; leave it out. Received: load_weight={load_weight}"
            )
        super().__init__(*args, **kwargs)

    def choose_tokens(self, logits_TE: Tensor, mask_T: Tensor | None) -> Tensor:
        """Chooses the tokens of each expert, equation 18.

        Each expert chooses `m = ceil(k |X| / n)` of the unmasked tokens `X`;
        with token groups, in each group.

        Args:
            logits_TE: float.
            mask_T: optional bool.

        Returns:
            bool `(T, E)`.
        """
        score_TE = log_softmax(logits_TE)
        if self.num_groups not in (None, 1):
            return self._choose_tokens_in_groups(score_TE, mask_T)
        num_tokens, num_experts = ops.shape(score_TE)
        max_chosen = tokens_per_expert(num_tokens, self.k, num_experts)
        num_chosen = tokens_per_expert(
            num_real_tokens(mask_T, num_tokens), self.k, num_experts
        )
        return gating.batchwise_mask(score_TE, num_chosen, max_chosen, mask_T)

    def _choose_tokens_in_groups(self, score_TE, mask_T):
        score_GTE, mask_GT = (
            token_groups.split_tokens(tensor, self.num_groups)
            for tensor in (score_TE, mask_T)
        )
        count_G = num_real_tokens(mask_GT, ops.shape(score_GTE)[1])
        chosen_GTE = gating.batchwise_mask_in_groups(
            score_GTE,
            tokens_per_expert(count_G, self.k, score_TE.shape[-1]),
            mask_GT,
        )
        return ops.reshape(chosen_GTE, ops.shape(score_TE))

    def gates(
        self, weight_TE: Tensor, chosen_TE: Tensor, mask_T: Tensor | None
    ) -> gating.Gates:
        """Makes `Gates` whose `K` is the largest number of experts of a token.

        `K` is `E` where shapes must be static, on a mesh, and with token
        groups.

        Args:
            weight_TE: float, gate values.
            chosen_TE: bool, whether an expert is chosen for a token.
            mask_T: optional bool.
        """
        if mask_T is not None:
            chosen_TE = ops.logical_and(chosen_TE, mask_T[:, None])
        max_experts = chosen_TE.shape[-1]
        static = xla.wants_static_shapes() or sharding.axes() is not None
        if self.num_groups in (None, 1) and not static:
            count_T = ops.sum(ops.cast(chosen_TE, "int32"), axis=-1)
            max_experts = ops.max(count_T, initial=1)
        return gating.gates_of_chosen(weight_TE, chosen_TE, max_experts)

    def get_config(self):
        config = super().get_config()
        del config["load_weight"]
        return config


@keras.saving.register_keras_serializable(package="moe_tf")
class ExpertChoiceRouter(ExpertChoiceBase, router.GateRouter):
    """Expert choice: every expert chooses tokens, at inference too.

    Each of the `n` experts chooses the `ceil(k T / n)` tokens with its largest
    softmax values, which are the gate values. The load is equal without any
    loss. A token may have any number of experts. The output of a token depends
    on the rest of the batch, at inference too, so use another router in a
    decoder, or where sentences are served one at a time.

    A token that holds NaN or infinity goes to every expert. Its gate values
    and the losses of its batch are NaN.

    Args:
        num_experts: int, `E`.
        k: int, mean number of experts of a token. Defaults to `4`.
        importance_weight: float, weight of the importance loss, equation 7.
            Defaults to `0.0`.
        z_loss_weight: float, weight of `losses.z_loss`. Defaults to `0.0`.

    Call arguments and returns: those of `Router`.

    Example:

    >>> router = moe_tf.layers.ExpertChoiceRouter(num_experts=4, k=2)
    >>> x_TD = np.random.default_rng(0).normal(size=(6, 16))
    >>> router(x_TD.astype("float32")).load_E.numpy()
    array([3., 3., 3., 3.], dtype=float32)

    Reference:
     - [Zhou et al., 2022](https://arxiv.org/abs/2202.09368)
    """

    def __init__(
        self,
        num_experts: int,
        k: int = 4,
        importance_weight: float = 0.0,
        z_loss_weight: float = 0.0,
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
        chosen_TE = self.choose_tokens(logits_TE, mask)
        return self.routing(
            self.gates(score_TE, chosen_TE, mask),
            mask,
            logits_TE=logits_TE,
        )

    def max_tokens_per_expert(
        self, num_tokens: int | Tensor, training: bool
    ) -> int | Tensor | None:
        return tokens_per_expert(num_tokens, self.k, self.num_experts)


def log_softmax(logits: Tensor) -> Tensor:
    """Computes the logarithm of the softmax, which does not underflow."""
    return logits - ops.logsumexp(logits, axis=-1, keepdims=True)


def tokens_per_expert(
    num_tokens: int | Tensor, k: int, num_experts: int
) -> int | Tensor:
    """Returns `m = ceil(k |X| / n)` of equation 18.

    Args:
        num_tokens: int or int tensor, `|X|`.
        k: int, mean number of experts of a token.
        num_experts: int, `n`.
    """
    return capacity.expert_capacity(num_tokens * k, num_experts, 1)


def num_real_tokens(
    mask_T: Tensor | None, num_tokens: int | Tensor
) -> int | Tensor:
    """Counts the unmasked tokens; with a mask `(G, T)`, of each group.

    Args:
        mask_T: optional bool `(T,)` or `(G, T)`.
        num_tokens: int, the count without a mask.
    """
    if mask_T is None:
        return num_tokens
    return ops.sum(ops.cast(mask_T, "int32"), axis=-1)
