"""Activations of the kernels in `gpu_kernels`, and their derivatives.

A kernel does little else while it computes an activation of its tile, so each
activation is written to cost one tanh or exponential where half precision
allows it. Nothing here has a higher precision than float32.
"""

import math
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton

Function = Callable[[jax.Array], jax.Array]


class Functions(typing.NamedTuple):
    """Functions of float32 tiles that activations are computed with."""

    sigmoid: Function
    tanh: Function
    normal_cdf: Function


def functions(dtype: str, interpret: bool) -> Functions:
    """Returns the functions for rows of `dtype`.

    For half precision, tanh is the instruction of the GPU, with a relative
    error of at most 2^-11 (PTX ISA, tanh.approx.f32). Sigmoids are computed
    from this tanh, with an error of at most 2^-12. The error of
    `a * sigmoid(a)` is thus at most 2^-12 of `a`, while rounding `a` to
    bfloat16 changes it by up to 2^-9. For float32 the functions are exact.

    Args:
        dtype: name of the dtype of the rows.
        interpret: bool, whether the kernels run without a GPU.
    """
    if jnp.dtype(dtype).itemsize > 2:
        return Functions(jax.nn.sigmoid, jnp.tanh, _normal_cdf)
    tanh = jnp.tanh if interpret else triton.approx_tanh

    def sigmoid(z):
        return 0.5 + 0.5 * tanh(0.5 * z)

    def normal_cdf(z):
        # A fit with an error below 5.1e-5, not monotone beyond 6.
        q = jnp.minimum(z * z, 36.0)
        u = z * (0.79750788 + q * (0.037005647 - q * 0.00035151687))
        return 0.5 + 0.5 * tanh(u)

    return Functions(sigmoid, tanh, normal_cdf)


def _normal_cdf(z):
    # Triton has no erf. Abramowitz and Stegun, 7.1.26: within 1e-7.
    t = 1.0 / (1.0 + 0.3275911 * math.sqrt(0.5) * jnp.abs(z))
    tail = 1.061405429
    for factor in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        tail = tail * t + factor
    tail = 0.5 * tail * t * jnp.exp(-0.5 * z * z)
    return jnp.where(z < 0.0, tail, 1.0 - tail)


class Activation(typing.NamedTuple):
    """An activation and its derivative on float32 tiles.

    Both functions take the `Functions` to use as their first argument.

    Attributes:
        value: the activation of `a`.
        slope: its derivative, as a function of `a`, or of the activation's
            value `h` if `of_value`.
        of_value: bool.
    """

    value: Callable[[Functions, jax.Array], jax.Array]
    slope: Callable[[Functions, jax.Array], jax.Array]
    of_value: bool = False


def _silu_slope(f, a):
    s = f.sigmoid(a)
    return s + a * s * (1.0 - s)


def _gelu_slope(f, a):
    density = math.sqrt(0.5 / math.pi) * jnp.exp(-0.5 * a * a)
    return f.normal_cdf(a) + a * density


# (1 + tanh(u)) / 2 is sigmoid(2 u), where 2 u is _GELU a + _CUBE a^3.
_GELU = 2.0 * math.sqrt(2.0 / math.pi)
_CUBE = 0.044715 * _GELU


def _gelu_tanh(f, a):
    return a * f.sigmoid(a * (_GELU + _CUBE * a * a))


def _gelu_tanh_slope(f, a):
    s = f.sigmoid(a * (_GELU + _CUBE * a * a))
    return s + a * s * (1.0 - s) * (_GELU + 3.0 * _CUBE * a * a)


# By the names in Keras; "gelu_tanh" is Keras's `gelu(x, approximate=True)`.
ACTIVATIONS = {
    "gelu": Activation(lambda f, a: a * f.normal_cdf(a), _gelu_slope),
    "gelu_tanh": Activation(_gelu_tanh, _gelu_tanh_slope),
    "linear": Activation(lambda f, a: a, lambda f, h: jnp.ones_like(h), True),
    "relu": Activation(
        lambda f, a: jnp.maximum(a, 0.0),
        lambda f, h: jnp.where(h > 0.0, 1.0, 0.0),
        True,
    ),
    "sigmoid": Activation(
        lambda f, a: f.sigmoid(a), lambda f, h: h * (1.0 - h), True
    ),
    "silu": Activation(lambda f, a: a * f.sigmoid(a), _silu_slope),
    "tanh": Activation(lambda f, a: f.tanh(a), lambda f, h: 1.0 - h * h, True),
}
