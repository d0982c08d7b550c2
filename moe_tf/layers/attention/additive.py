"""Additive attention and its product form, appendix G."""

import keras
from keras import ops

from moe_tf import checks
from moe_tf.layers.attention import multi_head
from moe_tf.types import Tensor

FORMS = ("product", "sum")


def product_scores(
    query_BLA: Tensor, key_BSA: Tensor, scale_A: Tensor
) -> Tensor:
    """Computes `sum_d V_d tanh(q_d) tanh(k_d)`, equation 22.

    Args:
        query_BLA: float, projected target vectors.
        key_BSA: float, `tanh` of the projected source vectors.
        scale_A: float, `V`.

    Returns:
        Float `(B, L, S)`.
    """
    query_BLA = ops.tanh(query_BLA) * scale_A
    return ops.matmul(query_BLA, ops.swapaxes(key_BSA, -1, -2))


def sum_scores(query_BLA: Tensor, key_BSA: Tensor, scale_A: Tensor) -> Tensor:
    """Computes `sum_d V_d tanh(q_d + k_d)`, equation 21, as GNMT does.

    Args:
        query_BLA: float, projected target vectors.
        key_BSA: float, projected source vectors.
        scale_A: float, `V`.

    Returns:
        Float `(B, L, S)`.
    """
    sum_BLSA = ops.expand_dims(query_BLA, 2) + ops.expand_dims(key_BSA, 1)
    return ops.sum(ops.tanh(sum_BLSA) * scale_A, axis=-1)


@keras.saving.register_keras_serializable(package="moe_tf")
class AdditiveAttention(keras.layers.Layer):
    """Attends from target vectors to source vectors, equations 21 and 22.

    The softmax over source positions is float32 or a higher precision.

    Args:
        units: int, attention width `A`.
        form: `"product"`, the paper's equation 22, or `"sum"`, GNMT's
            equation 21. The scores of the product are one matrix product;
            the sum needs a tensor of `L * S * A` entries. Defaults to
            `"product"`.

    Call arguments:
        inputs: float `(B, L, D)`, target vectors.
        values_BSD: float, source vectors.
        key_BSA: float, `keys(values_BSD)`.
        bias_BS: float32, 0 where there is a source word, -1e9 in padding.

    Returns:
        The weighted mean of the values, float `(B, L, D)`, and the weights,
        float32 `(B, L, S)`.

    Raises:
        ValueError: if `units` is below 1 or there is no such form.

    Reference:
     - [Shazeer et al., 2017](https://arxiv.org/abs/1701.06538), appendix G

    Example:

    >>> attention = moe_tf.layers.AdditiveAttention(units=6)
    >>> attention.build((2, 3, 8))
    >>> values_BSD = np.ones((2, 5, 8), "float32")
    >>> context_BLD, weight_BLS = attention(
    ...     np.ones((2, 3, 8), "float32"),
    ...     values_BSD,
    ...     attention.keys(values_BSD),
    ...     bias_BS=np.zeros((2, 5), "float32"),
    ... )
    >>> tuple(context_BLD.shape), tuple(weight_BLS.shape)
    ((2, 3, 8), (2, 3, 5))
    """

    def __init__(self, units: int, form: str = "product", **kwargs) -> None:
        super().__init__(**kwargs)
        checks.at_least("units", units, 1)
        if form not in FORMS:
            raise ValueError(
                f"`form` must be one of {', '.join(FORMS)}. "
                f"Received: form={form}"
            )
        self.units = units
        self.form = form

    def build(self, input_shape):
        shape_DA = (input_shape[-1], self.units)
        self.source_DA = self.add_weight(shape=shape_DA, name="source_kernel")
        self.query_DA = self.add_weight(shape=shape_DA, name="query_kernel")
        self.scale_A = self.add_weight(shape=(self.units,), name="scale")

    def keys(self, values_BSD: Tensor) -> Tensor:
        """Projects source vectors, float `(B, S, D)`, to `(B, S, A)`."""
        kernel_DA = ops.cast(self.source_DA, self.compute_dtype)
        key_BSA = ops.matmul(values_BSD, kernel_DA)
        return ops.tanh(key_BSA) if self.form == "product" else key_BSA

    def call(self, inputs, values_BSD, key_BSA, bias_BS):
        query_BLA = ops.matmul(inputs, self.query_DA)
        scores = product_scores if self.form == "product" else sum_scores
        score_BLS = scores(query_BLA, key_BSA, self.scale_A)
        weight_BLS = multi_head.attention_weights(
            score_BLS, ops.expand_dims(bias_BS, 1)
        )
        context_BLD = ops.matmul(
            ops.cast(weight_BLS, values_BSD.dtype), values_BSD
        )
        return context_BLD, weight_BLS

    def get_config(self):
        own = ("units", "form")
        return {
            **super().get_config(),
            **{name: getattr(self, name) for name in own},
        }
