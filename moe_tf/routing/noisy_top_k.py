"""Router of noisy top-k gating, section 2.1 of the paper."""

import keras
from keras import ops

from moe_tf.routing import gating
from moe_tf.routing import router


@keras.saving.register_keras_serializable(package="moe_tf")
class NoisyTopKRouter(router.Router):
    """Chooses `k` of `num_experts` experts for every token, equations 3-5.

    Noise is drawn only in training. Both kernels start at zero, so that the
    load starts balanced (appendix A). In training `SparseMoE` adds the
    importance loss (equation 7) and the load loss (equation 11), weighted
    and taken over the whole batch.

    If a token holds NaN or infinity, its gate values and the losses of its
    batch are NaN.

    Args:
        num_experts: int, `E`.
        k: int, experts kept for each token, `1 <= k <= E`. Defaults to `4`.
        importance_weight: float, `w_importance` of equation 7; 0 turns the
            loss off. Defaults to `0.1`.
        load_weight: float, `w_load` of equation 11; 0 turns the loss off.
            Defaults to `0.1`.
        z_loss_weight: float, weight of `losses.z_loss` of the logits before
            the noise. Defaults to `0.0`.
        seed: optional int for the noise.

    Call arguments and returns: those of `Router`.

    Example:

    >>> router = moe_tf.layers.NoisyTopKRouter(num_experts=8, k=2, seed=1)
    >>> routing = router(np.ones((5, 16), "float32"), training=True)
    >>> routing.gates.weight_TK.shape, routing.load_E.shape
    (TensorShape([5, 2]), TensorShape([8]))

    Reference:
     - [Shazeer et al., 2017](https://arxiv.org/abs/1701.06538), section 2,
       appendix A
    """

    def __init__(
        self,
        num_experts: int,
        k: int = 4,
        importance_weight: float = 0.1,
        load_weight: float = 0.1,
        z_loss_weight: float = 0.0,
        seed: int | None = None,
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
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    def build(self, input_shape):
        shape_DE = (input_shape[-1], self.num_experts)
        self.gate_DE, self.noise_DE = (
            self.add_weight(shape=shape_DE, initializer="zeros", name=name)
            for name in ("gate_kernel", "noise_kernel")
        )
        self.built = True

    @classmethod
    def weight_shapes(
        cls, width: int, num_experts: int
    ) -> list[tuple[int, ...]]:
        return [(width, num_experts)] * 2

    def call(self, inputs, mask=None, training=False):
        clean_TE = ops.matmul(inputs, self.gate_DE)
        noise = ()
        if training:
            std_TE = ops.softplus(ops.matmul(inputs, self.noise_DE))
            draw_TE = keras.random.normal(
                ops.shape(clean_TE), dtype=self.dtype, seed=self.seed_generator
            )
            noise = std_TE, draw_TE
        gates, probability_TE = gating.noisy_top_k(clean_TE, self.k, *noise)
        load_E = None  # Without noise `routing` counts the tokens.
        if training:
            if mask is not None:
                probability_TE *= ops.cast(mask, probability_TE.dtype)[:, None]
            load_E = ops.sum(probability_TE, axis=0)
        return self.routing(gates, mask, load_E=load_E, logits_TE=clean_TE)

    def get_config(self):
        return {**super().get_config(), "seed": self.seed}
