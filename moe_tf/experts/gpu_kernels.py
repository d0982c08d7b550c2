"""Forward and backward pass of many experts on a GPU, for export to XLA.

This module, `gpu_products` and `gpu_activations` import jax, and not
TensorFlow. `gpu` imports them when a layer runs on a GPU, and puts the
exported kernels into TensorFlow's programs.
"""

import functools
import typing
from collections.abc import Callable
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from moe_tf.experts import gpu_activations
from moe_tf.experts import gpu_products
from moe_tf.experts.gpu_products import Table
from moe_tf.experts.gpu_products import Tiles

# Name in XLA of the custom call that runs a kernel on a GPU.
TRITON = "__gpu$xla.gpu.triton"


class Plan(typing.NamedTuple):
    """Tiles of each product of `forward` and `backward`.

    The defaults are within 3% of the fastest tiles that were timed on an H100,
    in bfloat16 with silu, at 512 and at 4096 rows an expert.

    Attributes:
        first, second: of the products with the two matrices.
        dhidden, dinput: of the products that give the gradients of the hidden
            activations and of the inputs.
        dfirst, dsecond: of the products that give the gradients of the two
            matrices.
    """

    first: Tiles = Tiles(stages=4)
    second: Tiles = Tiles()
    dhidden: Tiles = Tiles(columns=128, warps=4)
    dinput: Tiles = Tiles()
    dfirst: Tiles = Tiles()
    dsecond: Tiles = Tiles()


def forward(
    x_SD: jax.Array,
    in_EDF: jax.Array,
    out_EFD: jax.Array,
    table: Table,
    activation: str,
    keep: bool,
    plan: Plan | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """Computes the expert of each slot on the slot's row.

    Args:
        x_SD: bfloat16, float16 or float32.
        in_EDF, out_EFD: of the same dtype.
        table: `Table`.
        activation: a name in `gpu_activations.ACTIVATIONS`.
        keep: bool, whether to return the intermediate results that `backward`
            would otherwise compute again.
        plan: optional `Plan`.
        interpret: bool, whether to run without a GPU, slowly.

    Returns:
        `(y_SD,)`. If `keep`, also `h_SF`, the outputs of the activation, and
        `a_SF`, its inputs, unless the derivative is a function of `h_SF`.
    """
    plan = plan or Plan()
    h_SF, *kept = _hidden(
        x_SD, in_EDF, table, activation, keep, plan.first, interpret
    )
    (y_SD,) = gpu_products.product(
        h_SF, out_EFD, table, tiles=plan.second, interpret=interpret
    )
    return (y_SD, h_SF, *kept) if keep else (y_SD,)


def backward(
    x_SD: jax.Array,
    in_EDF: jax.Array,
    out_EFD: jax.Array,
    table: Table,
    dy_SD: jax.Array,
    *kept: jax.Array,
    activation: str,
    dtype: str,
    plan: Plan | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes the gradients of `forward` in the rows and the matrices.

    Args:
        x_SD, in_EDF, out_EFD, table, activation, plan, interpret: see
            `forward`.
        dy_SD: of the dtype of `x_SD`; zeros in empty slots.
        *kept: the results of `forward` after the first, if `keep`. Without
            them they are computed again.
        dtype: dtype of the gradients of the matrices.

    Returns:
        `(dx_SD, din_EDF, dout_EFD)`.
    """
    plan = plan or Plan()
    if not kept:
        # The barrier keeps XLA from computing this before the gradient is
        # there, and from taking it for the computation of `forward`.
        x_SD, dy_SD = jax.lax.optimization_barrier((x_SD, dy_SD))
        kept = _hidden(
            x_SD, in_EDF, table, activation, True, plan.first, interpret
        )
    slope = gpu_activations.ACTIVATIONS[activation].slope
    functions = gpu_activations.functions(x_SD.dtype, interpret)

    def finish(dh, of):
        return (dh * slope(functions, of.astype(jnp.float32)),)

    run = functools.partial(
        gpu_products.product, table=table, transposed=True, interpret=interpret
    )
    (da_SF,) = run(
        dy_SD, out_EFD, finish=finish, beside=kept[-1:], tiles=plan.dhidden
    )
    (dx_SD,) = run(da_SF, in_EDF, tiles=plan.dinput)
    run = functools.partial(
        gpu_products.outer, table=table, dtype=dtype, interpret=interpret
    )
    din_EDF = run(x_SD, da_SF, tiles=plan.dfirst)
    dout_EFD = run(kept[0], dy_SD, tiles=plan.dsecond)
    return dx_SD, din_EDF, dout_EFD


def _hidden(x_SD, in_EDF, table, activation, keep, tiles, interpret):
    """Computes `h_SF`, and `a_SF` if it is kept for the derivative."""
    activation = gpu_activations.ACTIVATIONS[activation]
    functions = gpu_activations.functions(x_SD.dtype, interpret)
    answers = 2 if keep and not activation.of_value else 1
    return gpu_products.product(
        x_SD,
        in_EDF,
        table,
        finish=lambda a: (activation.value(functions, a), a)[:answers],
        answers=answers,
        tiles=tiles,
        interpret=interpret,
    )


def export(
    function: Callable[..., tuple[jax.Array, ...]],
    arguments: Sequence[tuple[tuple[int, ...], str]],
    platform: str,
) -> jax.export.Exported:
    """Exports `function` as StableHLO, for `XlaCallModule` of TensorFlow.

    Args:
        function: takes arrays and returns a tuple of arrays.
        arguments: shape and name of the dtype of each array.
        platform: `"cpu"` or `"cuda"`.

    Returns:
        `jax.export.Exported`.
    """
    return jax.export.export(
        jax.jit(function),
        platforms=[platform],
        # jax may change this custom call in any version, so callers require
        # one version of jax.
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(TRITON)],
    )(*(jax.ShapeDtypeStruct(*argument) for argument in arguments))
