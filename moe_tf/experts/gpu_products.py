"""Products of the rows of many experts, as kernels in Pallas for Triton.

Slots are in blocks of `BLOCK`. Each block has one expert, and its tokens come
first (`plans.plan_blocks`). An instance of a kernel computes one tile of an
answer. It reads from the tables the expert of its block and the number of
tokens in the block, and computes no product for an empty tile: shapes are
static, work is not.

Letters beside those of the project: `N` blocks, `I` and `O` the input and
output columns of a product.
"""

import functools
import math
import typing
from collections.abc import Callable
from collections.abc import Sequence
from typing import Self

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

# Slots in a block.
BLOCK = 128


class Tiles(typing.NamedTuple):
    """Sizes into which a kernel splits its work; results are the same.

    Attributes:
        rows, columns: shape of the tile of the answer that an instance
            computes.
        depth: number of terms of the sums that are loaded at a time.
        warps: number of warps of 32 threads that share a tile.
        stages: number of loads in flight.
        group: rows of tiles that are computed together, column by column, so
            that their inputs stay in the cache.
    """

    rows: int = 128
    columns: int = 256
    depth: int = 64
    warps: int = 8
    stages: int = 3
    group: int = 1

    def fit(self, rows: int, columns: int, depth: int, dtype: str) -> Self:
        """Returns tiles whose sizes divide an answer and its sums' terms.

        Args:
            rows, columns: shape of the answer.
            depth: number of terms of its sums.
            dtype: of the inputs. `self.depth` is for dtypes of two bytes, and
                is divided for those of more bytes.
        """
        factor = jnp.dtype(dtype).itemsize // 2
        return self._replace(
            rows=math.gcd(self.rows, rows),
            columns=math.gcd(self.columns, columns),
            depth=math.gcd(self.depth // factor, depth),
        )


class Table(typing.NamedTuple):
    """The routing in the form that the kernels read, all int32.

    Attributes:
        expert_N: the expert of each block.
        used_N: number of the block's slots that hold tokens.
        first_E: the first block of each expert.
        count_E: number of tokens in the blocks of each expert.
    """

    expert_N: jax.Array
    used_N: jax.Array
    first_E: jax.Array
    count_E: jax.Array


def table(expert_N: jax.Array, count_E: jax.Array) -> Table:
    """Makes the `Table` of a `plans.Blocks` of `BLOCK` slots a block.

    Args:
        expert_N: int32, the expert of each block.
        count_E: int32, number of tokens in the blocks of each expert.
    """
    blocks_E = (count_E + BLOCK - 1) // BLOCK
    first_E = jnp.cumsum(blocks_E, dtype=jnp.int32) - blocks_E
    position_N = jnp.arange(expert_N.shape[0], dtype=jnp.int32)
    before_N = (position_N - first_E[expert_N]) * BLOCK
    used_N = jnp.clip(count_E[expert_N] - before_N, 0, BLOCK)
    return Table(expert_N, used_N, first_E, count_E)


def product(
    x_SI: jax.Array,
    w_EIO: jax.Array,
    table: Table,
    finish: Callable[..., tuple[jax.Array, ...]] | None = None,
    beside: Sequence[jax.Array] = (),
    answers: int = 1,
    transposed: bool = False,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """Multiplies each slot's row with the matrix of its expert.

    Args:
        x_SI: bfloat16, float16 or float32.
        w_EIO: of the same dtype; `(E, O, I)` if `transposed`.
        table: `Table`.
        finish: optional function of a float32 tile of the product and of the
            same tiles of `beside`; returns a tuple of `answers` tiles.
            Defaults to the product alone.
        beside: arrays `(S, O)`, inputs of `finish`.
        answers: int, number of arrays that are returned.
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
    place = functools.partial(
        _place, across=across, down=down, group=tiles.group
    )
    kernel = functools.partial(
        _experts_product,
        tiles=tiles,
        place=place,
        finish=finish or (lambda y: (y,)),
        num_beside=len(beside),
        transposed=transposed,
    )
    tile = pl.BlockSpec((tiles.rows, tiles.columns), place)
    row = pl.BlockSpec((tiles.rows, depth), lambda p: (place(p)[0], 0))
    answer = jax.ShapeDtypeStruct((slots, columns), x_SI.dtype)
    return _call(
        kernel,
        (table.expert_N, table.used_N, x_SI, w_EIO, *beside),
        [
            *map(_whole, (table.expert_N, table.used_N)),
            row,
            _whole(w_EIO),
            *[tile] * len(beside),
        ],
        [answer] * answers,
        [tile] * answers,
        (across * down,),
        tiles,
        interpret,
    )


def _place(p, across, down, group):
    """Row and column of the tile that instance `p` computes.

    Tiles are computed in groups of `group` rows, column by column.
    """
    index, inside = _divmod(p, group * across)
    first = index * group
    height = jnp.minimum(down - first, group)
    j, i = _divmod(inside, height)
    return first + i, j


def _experts_product(
    expert_N,
    used_N,
    x_CI,
    w_EIO,
    *rest,
    tiles,
    place,
    finish,
    num_beside,
    transposed,
):
    """Kernel of `product`: one tile of each answer. See there."""
    beside, answers = rest[:num_beside], rest[num_beside:]
    i, j = place(pl.program_id(0))
    block, part = _divmod(i, BLOCK // tiles.rows)  # tiles of rows in a block
    expert = expert_N[block]
    has_tokens = used_N[block] > part * tiles.rows
    steps = has_tokens.astype(jnp.int32) * (x_CI.shape[1] // tiles.depth)
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


def outer(
    x_SI: jax.Array,
    y_SO: jax.Array,
    table: Table,
    dtype: str | None = None,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Multiplies the transposed rows of `x` of each expert with those of `y`.

    Args:
        x_SI, y_SO: of one dtype. Some rows of empty slots are multiplied too,
            so rows of empty slots in `y_SO` must be zeros.
        table: `Table`.
        dtype: optional dtype of the answer. Defaults to that of `x_SI`.
        tiles: optional `Tiles`; `rows` and `columns` split the answer's
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
    """Quotient and remainder of int32 that are not negative."""
    return jax.lax.div(a, b), jax.lax.rem(a, b)


def _whole(array):
    """Passes all of `array` to every instance, which loads parts of it."""
    return pl.BlockSpec(array.shape, lambda *_: (0,) * array.ndim)


def _call(
    kernel, arrays, in_specs, out_shape, out_specs, grid, tiles, interpret
):
    params = triton.CompilerParams(
        num_warps=tiles.warps, num_stages=tiles.stages
    )
    return pl.pallas_call(
        kernel,
        out_shape=out_shape,
        in_specs=in_specs,
        out_specs=out_specs,
        grid=grid,
        interpret=interpret,
        compiler_params=None if interpret else params,
    )(*arrays)
