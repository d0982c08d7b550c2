"""Products of many experts on a GPU: kernels in Pallas, for Triton.

This module and `expert_activations` alone import jax, and not TensorFlow:
`gpu_experts` imports it where a layer runs on a GPU, and puts what is exported
here into TensorFlow's programs.

Slots lie in blocks of `BLOCK`, each of one expert, its tokens first
(`plans.plan_blocks`). A kernel instance computes one tile of an answer. It
reads from the tables which expert its block belongs to and how many tokens
are in it, and does no product for an empty tile: shapes are static, work is
not.

Letters beside those of the project: `N` blocks, `I` and `O` the columns that
go in and out of a product.
"""

import functools
import math
import typing

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from moe_tf.experts import gpu_activations

# Slots in a block.
BLOCK = 128

# The custom call that runs a kernel on a GPU, as XLA knows it.
TRITON = "__gpu$xla.gpu.triton"


class Tiles(typing.NamedTuple):
    """How a kernel cuts its work: none of it changes what is computed.

    Attributes:
        rows, columns: shape of the tile of the answer that an instance
            computes.
        depth: terms of the sums that are loaded at a time.
        warps: of 32 threads, that share a tile.
        stages: loads in flight.
        group: rows of tiles that are computed together, column by column, so
            that what they read is found in the cache.
    """

    rows: int = 128
    columns: int = 256
    depth: int = 64
    warps: int = 8
    stages: int = 3
    group: int = 1

    def fit(self, rows, columns, depth, dtype):
        """These, cut down to divide an answer and the terms of its sums.

        `depth` is that of two bytes a number: wider ones take more room.
        """
        wide = jnp.dtype(dtype).itemsize // 2
        return self._replace(
            rows=math.gcd(self.rows, rows),
            columns=math.gcd(self.columns, columns),
            depth=math.gcd(self.depth // wide, depth),
        )


class Table(typing.NamedTuple):
    """What the kernels need to know of the routing, all int32.

    Attributes:
        expert_N: the expert of each block.
        used_N: how many of the block's slots hold tokens.
        first_E: the first block of each expert.
        count_E: the tokens in the blocks of each expert.
    """

    expert_N: typing.Any
    used_N: typing.Any
    first_E: typing.Any
    count_E: typing.Any


def table(expert_N, count_E):
    """The `Table` of a `plans.Blocks` of `BLOCK` slots a block."""
    blocks_E = (count_E + BLOCK - 1) // BLOCK
    first_E = jnp.cumsum(blocks_E, dtype=jnp.int32) - blocks_E
    position_N = jnp.arange(expert_N.shape[0], dtype=jnp.int32)
    before_N = (position_N - first_E[expert_N]) * BLOCK
    used_N = jnp.clip(count_E[expert_N] - before_N, 0, BLOCK)
    return Table(expert_N, used_N, first_E, count_E)


def product(
    x_SI,
    w_EIO,
    table,
    finish=None,
    beside=(),
    answers=1,
    transposed=False,
    tiles=None,
    interpret=False,
):
    """Each slot's row times the matrix of its expert.

    Args:
        x_SI: bfloat16, float16 or float32.
        w_EIO: of the same dtype; `(E, O, I)` if `transposed`.
        table: `Table`.
        finish: optional function of a float32 tile of the product and of the
            same tiles of `beside`; returns a tuple of `answers` tiles.
            Defaults to the product alone.
        beside: arrays `(S, O)`, inputs of `finish`.
        answers: int, how many arrays are returned.
        transposed: bool, whether the matrices are stored transposed.
        tiles: optional `Tiles`.
        interpret: bool, whether to run without a GPU, slowly.

    Returns:
        A tuple of arrays `(S, O)` of the dtype of `x_SI`. In tiles without
        tokens they are `finish` of zeros.
    """
    slots, depth = x_SI.shape
    columns = w_EIO.shape[1 if transposed else 2]
    tiles = (tiles or Tiles()).fit(BLOCK, columns, depth, x_SI.dtype)
    across, down = columns // tiles.columns, slots // tiles.rows
    parts = BLOCK // tiles.rows  # tiles of rows in a block
    finish = finish or (lambda y: (y,))

    def place(p):
        group, inside = _divmod(p, tiles.group * across)
        first = group * tiles.group
        height = jnp.minimum(down - first, tiles.group)
        j, i = _divmod(inside, height)
        return first + i, j

    def experts_product(expert_N, used_N, x_CI, w_EIO, *rest):
        beside, answers = rest[: len(rest) - count], rest[len(rest) - count :]
        i, j = place(pl.program_id(0))
        block, part = _divmod(i, parts)
        expert = expert_N[block]
        full = used_N[block] > part * tiles.rows
        steps = full.astype(jnp.int32) * (depth // tiles.depth)
        column = pl.ds(j * tiles.columns, tiles.columns)

        def add(k, sum_CO):
            term = pl.ds(k * tiles.depth, tiles.depth)
            if transposed:
                w_IO = w_EIO[expert, column, term].T
            else:
                w_IO = w_EIO[expert, term, column]
            return sum_CO + _dot(x_CI[:, term], w_IO)

        zeros_CO = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
        sum_CO = jax.lax.fori_loop(0, steps, add, zeros_CO)
        tiles_CO = finish(sum_CO, *(reference[...] for reference in beside))
        for answer_CO, tile_CO in zip(answers, tiles_CO, strict=True):
            answer_CO[...] = tile_CO.astype(answer_CO.dtype)

    count = answers
    tile = pl.BlockSpec((tiles.rows, tiles.columns), place)
    row = pl.BlockSpec((tiles.rows, depth), lambda p: (place(p)[0], 0))
    like = jax.ShapeDtypeStruct((slots, columns), x_SI.dtype)
    return _call(
        experts_product,
        (table.expert_N, table.used_N, x_SI, w_EIO, *beside),
        [
            *map(_whole, (table.expert_N, table.used_N)),
            row,
            _whole(w_EIO),
            *[tile] * len(beside),
        ],
        [like] * answers,
        [tile] * answers,
        (across * down,),
        tiles,
        interpret,
    )


def outer(x_SI, y_SO, table, dtype=None, tiles=None, interpret=False):
    """Of each expert, the transposed rows of `x` times the rows of `y`.

    Args:
        x_SI, y_SO: of one dtype. Rows of empty slots are not all left out:
            those of `y_SO` must be zeros.
        table: `Table`.
        dtype: optional dtype of the answer. Defaults to theirs.
        tiles: optional `Tiles`; `rows` and `columns` cut the answer's
            matrices, `depth` the slots.
        interpret: bool, whether to run without a GPU, slowly.

    Returns:
        `(E, I, O)`; zeros for experts without tokens.
    """
    rows, columns = x_SI.shape[1], y_SO.shape[1]
    tiles = (tiles or Tiles()).fit(rows, columns, BLOCK, x_SI.dtype)
    experts = table.count_E.shape[0]

    def experts_outer(first_E, count_E, x_SI, y_SO, answer_IO):
        expert, i, j = pl.program_id(2), pl.program_id(1), pl.program_id(0)
        row = pl.ds(i * tiles.rows, tiles.rows)
        column = pl.ds(j * tiles.columns, tiles.columns)
        first = first_E[expert] * BLOCK
        steps, _ = _divmod(count_E[expert] + tiles.depth - 1, tiles.depth)

        def add(c, sum_IO):
            slot = pl.ds(first + c * tiles.depth, tiles.depth)
            return sum_IO + _dot(x_SI[slot, row].T, y_SO[slot, column])

        zeros_IO = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
        sum_IO = jax.lax.fori_loop(0, steps, add, zeros_IO)
        answer_IO[...] = sum_IO.astype(answer_IO.dtype)

    tile = pl.BlockSpec(
        (None, tiles.rows, tiles.columns), lambda j, i, expert: (expert, i, j)
    )
    arrays = (table.first_E, table.count_E, x_SI, y_SO)
    shape = (experts, rows, columns)
    return _call(
        experts_outer,
        arrays,
        [*map(_whole, arrays)],
        jax.ShapeDtypeStruct(shape, dtype or x_SI.dtype),
        tile,
        (columns // tiles.columns, rows // tiles.rows, experts),
        tiles,
        interpret,
    )


def _dot(x, y):
    return jnp.dot(x, y, preferred_element_type=jnp.float32)


def _divmod(a, b):
    """Of int32 that are not negative, without Python's care for signs."""
    return jax.lax.div(a, b), jax.lax.rem(a, b)


def _whole(array):
    """All of `array` for every instance, which loads what it wants of it."""
    return pl.BlockSpec(array.shape, lambda *_: (0,) * array.ndim)


def _call(kernel, arrays, in_specs, like, out_specs, grid, tiles, interpret):
    params = triton.CompilerParams(
        num_warps=tiles.warps, num_stages=tiles.stages
    )
    return pl.pallas_call(
        kernel,
        out_shape=like,
        in_specs=in_specs,
        out_specs=out_specs,
        grid=grid,
        interpret=interpret,
        compiler_params=None if interpret else params,
    )(*arrays)


class Plan(typing.NamedTuple):
    """Tiles of each of the products of `forward` and `backward`.

    The defaults are the fastest, or within 3% of it, of those timed on an H100
    in bfloat16 at 512 and 4096 rows an expert with silu.

    Attributes:
        first, second: of the rows with the two matrices.
        dhidden, dinput: of the incoming gradient back through them.
        dfirst, dsecond: of the gradients of the matrices.
    """

    first: Tiles = Tiles(stages=4)
    second: Tiles = Tiles()
    dhidden: Tiles = Tiles(columns=128, warps=4)
    dinput: Tiles = Tiles()
    dfirst: Tiles = Tiles()
    dsecond: Tiles = Tiles()


def forward(
    x_SD, in_EDF, out_EFD, table, activation, keep, plan=None, interpret=False
):
    """The answers of the experts to their slots' rows.

    Args:
        x_SD: bfloat16, float16 or float32.
        in_EDF, out_EFD: of the same dtype.
        table: `Table`.
        activation: a name in `expert_activations.ACTIVATIONS`.
        keep: bool, whether to return what `backward` would compute again.
        plan: optional `Plan`.
        interpret: bool, whether to run without a GPU, slowly.

    Returns:
        `(y_SD,)`. If `keep`, followed by `h_SF`, what comes out of the
        activation, and, unless its slope is of that, by `a_SF`, what goes in.
    """
    plan = plan or Plan()
    h_SF, *kept = _hidden(
        x_SD, in_EDF, table, activation, keep, plan.first, interpret
    )
    (y_SD,) = product(
        h_SF, out_EFD, table, tiles=plan.second, interpret=interpret
    )
    return (y_SD, h_SF, *kept) if keep else (y_SD,)


def backward(
    x_SD,
    in_EDF,
    out_EFD,
    table,
    dy_SD,
    *kept,
    activation,
    dtype,
    plan=None,
    interpret=False,
):
    """Gradients of `forward` in the rows and the matrices.

    Args:
        x_SD, in_EDF, out_EFD, table, activation, plan, interpret: those of
            `forward`.
        dy_SD: of the dtype of `x_SD`; zeros in empty slots.
        *kept: what `forward` kept. By default it is computed again.
        dtype: of the gradients of the matrices.

    Returns:
        `(dx_SD, din_EDF, dout_EFD)`.
    """
    plan = plan or Plan()
    if not kept:
        # Not before the gradient is there, nor taken for the first time.
        x_SD, dy_SD = jax.lax.optimization_barrier((x_SD, dy_SD))
        kept = _hidden(
            x_SD, in_EDF, table, activation, True, plan.first, interpret
        )
    slope = gpu_activations.ACTIVATIONS[activation].slope
    functions = gpu_activations.functions(x_SD.dtype, interpret)

    def finish(dh, of):
        return (dh * slope(functions, of.astype(jnp.float32)),)

    run = functools.partial(
        product, table=table, transposed=True, interpret=interpret
    )
    (da_SF,) = run(
        dy_SD, out_EFD, finish=finish, beside=kept[-1:], tiles=plan.dhidden
    )
    (dx_SD,) = run(da_SF, in_EDF, tiles=plan.dinput)
    run = functools.partial(
        outer, table=table, dtype=dtype, interpret=interpret
    )
    din_EDF = run(x_SD, da_SF, tiles=plan.dfirst)
    dout_EFD = run(kept[0], dy_SD, tiles=plan.dsecond)
    return dx_SD, din_EDF, dout_EFD


def _hidden(x_SD, in_EDF, table, activation, keep, tiles, interpret):
    """`h_SF`, and `a_SF` if it is to be kept and the slope is of it."""
    activation = gpu_activations.ACTIVATIONS[activation]
    functions = gpu_activations.functions(x_SD.dtype, interpret)
    answers = 2 if keep and not activation.of_value else 1
    return product(
        x_SD,
        in_EDF,
        table,
        finish=lambda a: (activation.value(functions, a), a)[:answers],
        answers=answers,
        tiles=tiles,
        interpret=interpret,
    )


def export(function, arguments, platform):
    """`function` as StableHLO, for `XlaCallModule` of TensorFlow.

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
        # jax promises nothing of this one from version to version: callers
        # hold the version fixed.
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(TRITON)],
    )(*(jax.ShapeDtypeStruct(*argument) for argument in arguments))
