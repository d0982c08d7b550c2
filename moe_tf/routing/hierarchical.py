"""Router of the hierarchical mixture of experts, appendix B."""

import keras
import tensorflow as tf
from keras import ops

from moe_tf import sharding
from moe_tf.routing import gating
from moe_tf.routing import two_level


@keras.saving.register_keras_serializable(package="moe_tf")
class HierarchicalRouter(two_level.TwoLevelRouter):
    """Chooses `k` of `P` branches, and in each of them `k` of its `Q` experts.

    A primary gate chooses branches. Each branch has a secondary gate of its
    own, which reads the same token and chooses experts. All are noisy top-k
    gates (equations 3-5). A token thus has `k * k` experts, each weighted by
    the product of its two gate values (equation 12). Expert `j` of branch `i`
    is expert `i * Q + j`. Only the gates of chosen branches are computed.

    In training `SparseMoE` adds the losses of equations 7 and 11 over all
    `P * Q` experts, with importance and load from equations 13 and 14. The
    load of an expert is `Load_primary_i * Load_i(X_i)_j / |X_i|`, where `X_i`
    are the tokens that chose branch `i`. The load thus has a gradient to the
    primary gate too.

    If a token holds NaN or infinity, its gate values and the losses of its
    batch are NaN.

    Args:
        branching: pair of ints `(P, Q)`, branches and experts in each branch.
        k: int, choices at each level, at most `P` and at most `Q`. Defaults
            to `2`.
        importance_weight: float, weight of the importance loss. Defaults to
            `0.1`.
        load_weight: float, weight of the load loss. Defaults to `0.1`.
        seed: optional int for the noise.

    Call arguments and returns: those of `Router`; `num_experts` is `P * Q`.

    Example:

    >>> router = moe_tf.layers.HierarchicalRouter(branching=(4, 8), k=2)
    >>> routing = router(np.ones((5, 16), "float32"))
    >>> routing.gates.expert_TK.shape, routing.load_E.shape
    (TensorShape([5, 4]), TensorShape([32]))

    Reference:
     - [Shazeer et al., 2017](https://arxiv.org/abs/1701.06538), appendix B
    """

    def __init__(
        self,
        branching: tuple[int, int],
        k: int = 2,
        importance_weight: float = 0.1,
        load_weight: float = 0.1,
        seed: int | None = None,
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
        num_branches, branch_size = self.branching
        width = input_shape[-1]
        self.primary_gate_DP, self.primary_noise_DP = (
            self.add_weight(
                shape=(width, num_branches), initializer="zeros", name=name
            )
            for name in ("primary_gate_kernel", "primary_noise_kernel")
        )
        self.secondary_gate_PDQ, self.secondary_noise_PDQ = (
            self.add_weight(
                shape=(num_branches, width, branch_size),
                initializer="zeros",
                name=name,
            )
            for name in ("secondary_gate_kernel", "secondary_noise_kernel")
        )
        self.built = True

    # Twice the gates' kernels: each gate has one for the noise.
    @classmethod
    def weight_shapes(
        cls, width: int, branching: tuple[int, int]
    ) -> list[tuple[int, ...]]:
        return super().weight_shapes(width, branching) * 2

    @classmethod
    def operations_per_token(
        cls, width: int, branching: tuple[int, int], k: int
    ) -> int:
        return super().operations_per_token(width, branching, k) * 2

    def call(self, inputs, mask=None, training=False):
        num_branches, branch_size = self.branching
        primary, probability_TP = self._choose(
            ops.matmul(inputs, self.primary_gate_DP),
            ops.matmul(inputs, self.primary_noise_DP) if training else None,
        )
        primary = gating.mask_gates(primary, num_branches, mask)
        clean_TKQ, raw_TKQ = self._secondary(
            inputs, primary.expert_TK, training
        )
        secondary, probability_TKQ = self._choose(clean_TKQ, raw_TKQ)

        weight_TKK = primary.weight_TK[:, :, None] * secondary.weight_TK
        first_TK1 = branch_size * primary.expert_TK[:, :, None]
        # The branch of a masked token is one past the last; so is its expert.
        expert_TKK = ops.minimum(
            first_TK1 + secondary.expert_TK, self.num_experts
        )
        gates = gating.Gates(
            ops.reshape(weight_TKK, (-1, self.k * self.k)),
            ops.reshape(expert_TKK, (-1, self.k * self.k)),
        )
        load_E = None  # Without noise `routing` counts the tokens.
        if training:
            load_E = self._load(primary, probability_TP, probability_TKQ, mask)
        return self.routing(gates, mask, load_E=load_E)

    def _choose(self, clean, raw):
        """Noisy top-k over the last axis; `raw` is None without noise."""
        if raw is None:
            return gating.noisy_top_k(clean, self.k)
        draw = keras.random.normal(
            ops.shape(clean), dtype=self.dtype, seed=self.seed_generator
        )
        return gating.noisy_top_k(clean, self.k, ops.softplus(raw), draw)

    def _secondary(self, x_TD, branch_TK, training):
        """Computes the secondary gates of each token's branches.

        Returns:
            Logits and, in training, the noise before Softplus: `(T, K, Q)`.
        """
        num_branches, branch_size = self.branching
        kernels = [self.secondary_gate_PDQ]
        if training:
            kernels.append(self.secondary_noise_PDQ)
        both_PDQ = ops.concatenate(kernels, axis=-1)
        if sharding.axes() is None:
            both_SQ, plan = two_level.matmul_of_chosen_branches(
                x_TD, branch_TK, both_PDQ
            )
            both_TKQ = plan.collect(both_SQ)
        else:
            # A device holds all gates, and a mesh has no plan without capacity.
            both_TPQ = two_level.matmul_of_all_branches(x_TD, both_PDQ)
            chosen_TKP = ops.one_hot(
                branch_TK, num_branches, dtype=both_TPQ.dtype
            )
            both_TKQ = tf.einsum("TKP,TPQ->TKQ", chosen_TKP, both_TPQ)
        if not training:
            return both_TKQ, None
        return both_TKQ[..., :branch_size], both_TKQ[..., branch_size:]

    def _load(self, primary, probability_TP, probability_TKQ, mask):
        """Computes the load of all experts, equation 14: `(P * Q,)`."""
        num_branches, branch_size = self.branching
        if mask is not None:
            probability_TP *= ops.cast(mask, probability_TP.dtype)[:, None]
        load_P1 = ops.sum(probability_TP, axis=0)[:, None]
        count_P1 = gating.count_assigned(primary, num_branches)[:, None]
        load_PQ = gating.sum_by_expert(
            probability_TKQ, primary.expert_TK, num_branches
        )
        load_PQ *= load_P1 / ops.maximum(count_P1, 1.0)
        return ops.reshape(load_PQ, (-1,))

    def get_config(self):
        return {**super().get_config(), "seed": self.seed}
