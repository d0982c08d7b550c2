"""The gates of the two-level mixture of experts, appendix B."""

import keras
import tensorflow as tf
from keras import ops

from moe_tf import sharding
from moe_tf.routing import gating
from moe_tf.routing import two_level


@keras.saving.register_keras_serializable(package="moe_tf")
class HierarchicalRouter(two_level.TwoLevelRouter):
    """Chooses `k` of `P` groups, and in each of them `k` of its `Q` experts.

    A primary gate chooses groups; each group has a secondary gate of its own,
    which reads the same token. Both are noisy top-k gates (equations 3-5). A
    token thus gets `k * k` experts, each weighted by the product of its two
    gate values (equation 12); expert `j` of group `i` is expert `i * Q + j`.
    Only the gates of chosen groups are computed.

    In training the layer adds the losses of equations 7 and 11 over all
    `P * Q` experts, with importance and load from equations 13 and 14: the
    load of an expert is `Load_primary_i * Load_i(X_i)_j / |X_i|`, where
    `X_i` are the tokens that chose group `i`; so it has a gradient to the
    primary gate too.

    A token that holds NaN or infinity gets NaN for its gates, and makes the
    losses of its batch NaN.

    Args:
        branching: pair of ints `(P, Q)`, groups and experts in each group.
        k: int, kept at each level, at most `P` and at most `Q`. Defaults to
            `2`.
        importance_weight: float, weight of the importance loss. Defaults to
            `0.1`.
        load_weight: float, weight of the load loss. Defaults to `0.1`.
        seed: optional int for the noise.

    Call arguments and returns: those of `Router`; `num_experts` is `P * Q`.

    Reference:
     - [Shazeer et al., 2017](https://arxiv.org/abs/1701.06538), appendix B
    """

    def __init__(
        self,
        branching,
        k=2,
        importance_weight=0.1,
        load_weight=0.1,
        seed=None,
        **kwargs,
    ):
        super().__init__(
            branching,
            k,
            importance_weight=importance_weight,
            load_weight=load_weight,
            **kwargs,
        )
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    def build(self, input_shape):
        groups, group_size = self.branching
        width = input_shape[-1]
        self.primary_gate_DP, self.primary_noise_DP = (
            self.add_weight(
                shape=(width, groups), initializer="zeros", name=name
            )
            for name in ("primary_gate_kernel", "primary_noise_kernel")
        )
        self.secondary_gate_PDQ, self.secondary_noise_PDQ = (
            self.add_weight(
                shape=(groups, width, group_size),
                initializer="zeros",
                name=name,
            )
            for name in ("secondary_gate_kernel", "secondary_noise_kernel")
        )
        self.built = True

    def call(self, inputs, mask=None, training=False):
        groups, group_size = self.branching
        primary, chance_TP = self._choose(
            ops.matmul(inputs, self.primary_gate_DP),
            ops.matmul(inputs, self.primary_noise_DP) if training else None,
        )
        primary = gating.masked(primary, groups, mask)
        clean_TKQ, raw_TKQ = self._secondary(
            inputs, primary.expert_TK, training
        )
        secondary, chance_TKQ = self._choose(clean_TKQ, raw_TKQ)

        weight_TKK = primary.weight_TK[:, :, None] * secondary.weight_TK
        first_TK1 = group_size * primary.expert_TK[:, :, None]
        # A masked token's group is one past the last, and so is its expert.
        expert_TKK = ops.minimum(
            first_TK1 + secondary.expert_TK, self.num_experts
        )
        gates = gating.Gates(
            ops.reshape(weight_TKK, (-1, self.k * self.k)),
            ops.reshape(expert_TKK, (-1, self.k * self.k)),
        )
        load_E = None  # without noise it is counted
        if training:
            load_E = self._load(primary, chance_TP, chance_TKQ, mask)
        return self.routing(gates, mask, load_E=load_E)

    def _choose(self, clean, raw):
        """Noisy top-k over the last axis; `raw` is None without noise."""
        if raw is None:
            return gating.noisy_top_k(clean, self.k)
        draw = keras.random.normal(
            ops.shape(clean), dtype=self.dtype, seed=self.seed_generator
        )
        return gating.noisy_top_k(clean, self.k, ops.softplus(raw), draw)

    def _secondary(self, x_TD, group_TK, training):
        """What each chosen group's gate says of a token.

        Returns:
            Logits and, in training, the noise before Softplus: `(T, K, Q)`.
        """
        groups, group_size = self.branching
        kernels = [self.secondary_gate_PDQ]
        if training:
            kernels.append(self.secondary_noise_PDQ)
        both_PDQ = ops.concatenate(kernels, axis=-1)
        if sharding.axes() is None:
            both_SQ, plan = two_level.of_chosen(x_TD, group_TK, both_PDQ)
            both_TKQ = plan.collect(both_SQ)
        else:
            # Each device has every gate, and no plan without a capacity.
            both_TPQ = two_level.of_all(x_TD, both_PDQ)
            chosen_TKP = ops.one_hot(group_TK, groups, dtype=both_TPQ.dtype)
            both_TKQ = tf.einsum("TKP,TPQ->TKQ", chosen_TKP, both_TPQ)
        if not training:
            return both_TKQ, None
        return both_TKQ[..., :group_size], both_TKQ[..., group_size:]

    def _load(self, primary, chance_TP, chance_TKQ, mask):
        """Equation 14, flat: `(P * Q,)`."""
        groups, group_size = self.branching
        if mask is not None:
            chance_TP *= ops.cast(mask, chance_TP.dtype)[:, None]
        load_P1 = ops.sum(chance_TP, axis=0)[:, None]
        number_P1 = gating.assigned(primary, groups)[:, None]
        load_PQ = gating.sum_by_expert(chance_TKQ, primary.expert_TK, groups)
        load_PQ *= load_P1 / ops.maximum(number_P1, 1.0)
        return ops.reshape(load_PQ, (-1,))

    def get_config(self):
        return {**super().get_config(), "seed": self.seed}
