"""Activations of the kernels in `expert_kernels`, and their slopes.

A kernel does little else while it takes them of its tile, so they are written
to cost one tanh or exponential where half precision allows it. Nothing here
is wider than float32.
"""

import math
import typing

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton


class Functions(typing.NamedTuple):
    """What activations are made of."""

    sigmoid: typing.Callable
    tanh: typing.Callable
    normal_cdf: typing.Callable


def functions(dtype, interpret):
    """Those for rows of `dtype`, of float32 tiles.

    Half precision takes the tanh of the hardware, off by at most 2^-11 of its
    value (PTX ISA, tanh.approx.f32), and sigmoids through it, off by 2^-12. So
    `a * sigmoid(a)` is off by 2^-12 of `a`, where rounding `a` to bfloat16
    moves it by up to 2^-9. float32 takes exact functions.
    """
    if jnp.dtype(dtype).itemsize > 2:
        return Functions(jax.nn.sigmoid, jnp.tanh, _normal_cdf)
    tanh = jnp.tanh if interpret else triton.approx_tanh

    def sigmoid(z):
        return 0.5 + 0.5 * tanh(0.5 * z)

    def normal_cdf(z):
        # Fitted here, within 5.1e-5. Past 6 the polynomial would turn back.
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
    """A function of float32 tiles, and its slope, of `Functions` besides.

    Attributes:
        value: of what goes in, `a`.
        slope: of `a`, or of the value, `h`, if `of_value`.
        of_value: bool.
    """

    value: typing.Callable
    slope: typing.Callable
    of_value: bool = False


def _silu_slope(f, a):
    s = f.sigmoid(a)
    return s + a * s * (1.0 - s)


def _gelu_slope(f, a):
    density = math.sqrt(0.5 / math.pi) * jnp.exp(-0.5 * a * a)
    return f.normal_cdf(a) + a * density


# (1 + tanh(u)) / 2 is sigmoid(2 u), and 2 u is _GELU a + _CUBE a^3.
_GELU = 2.0 * math.sqrt(2.0 / math.pi)
_CUBE = 0.044715 * _GELU


def _gelu_tanh(f, a):
    return a * f.sigmoid(a * (_GELU + _CUBE * a * a))


def _gelu_tanh_slope(f, a):
    s = f.sigmoid(a * (_GELU + _CUBE * a * a))
    return s + a * s * (1.0 - s) * (_GELU + 3.0 * _CUBE * a * a)


# By their names in Keras; "gelu_tanh" is its `gelu(x, approximate=True)`.
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
