"""The mesh of a config, and functions that compute on this mesh."""

import functools
from collections.abc import Callable
from typing import Any

import ml_collections
import numpy as np
import tensorflow as tf

from moe_tf import sharding
from moe_tf.distribute import MeshStrategy
from moe_tf.distribute import placement
from moe_tf.models import layer_specs

# Divides the rows of every batch where a mesh or token groups are used. It
# does not depend on the mesh's size: batches are the same on any mesh.
_ROWS_MULTIPLE = 8


def mesh_axes(config: ml_collections.ConfigDict) -> dict[str, int] | None:
    """Returns the sizes of the axes of `config.mesh`; None without a mesh."""
    sizes = {name: size for name, size in config.mesh.items() if size}
    return {"batch": 1, **sizes} if sizes else None


def make_strategy(config: ml_collections.ConfigDict) -> MeshStrategy | None:
    """Makes the `MeshStrategy` of `config.mesh`; None without a mesh.

    To be called before anything else uses TensorFlow.

    Raises:
        ValueError: the axes cannot be used, or there are too few devices.
        RuntimeError: TensorFlow has started already.
    """
    axes = mesh_axes(config)
    return None if axes is None else MeshStrategy(axes)


def check_mesh(config: ml_collections.ConfigDict, layers: tuple) -> None:
    """Checks that a mesh divides batch and experts; sets its defaults.

    The defaults are those of `data.rows_multiple`, and of `moe.num_groups`
    where tokens may be dropped or experts choose: which tokens are dropped
    must not depend on the mesh.

    Args:
        config: the run's config, whose counts are valid.
        layers: the model's layers as data, see `layer_specs`.

    Raises:
        ValueError: a size does not divide what it must.
    """
    axes, moe = mesh_axes(config) or {"batch": 1}, config.moe
    on_mesh = mesh_axes(config) is not None
    mixtures = layer_specs.mixtures(layers)
    depends_on_groups = moe.capacity_factor is not None or any(
        layer.router_class.chooses_in_groups for layer in mixtures
    )
    if on_mesh and mixtures and depends_on_groups and moe.num_groups is None:
        moe.num_groups = config.data.rows_multiple or _ROWS_MULTIPLE
    num_groups = moe.num_groups
    if config.data.rows_multiple is None and (on_mesh or num_groups):
        config.data.rows_multiple = _ROWS_MULTIPLE
    batch, rows = axes["batch"], config.data.rows_multiple or 1
    _check_divides("mesh.batch", batch, "data.rows_multiple", rows)
    if num_groups is not None:
        _check_divides("mesh.batch", batch, "moe.num_groups", num_groups)
        _check_divides("moe.num_groups", num_groups, "data.rows_multiple", rows)
    axis = sharding.expert_axis(axes)
    for layer in mixtures:
        _check_divides(f"mesh.{axis}", axes[axis], "experts", layer.num_experts)
    if "expert" in axes and not mixtures:
        raise ValueError(
            "`mesh.expert` is for variants with a choice of experts; leave it "
            f"out here. Received: mesh.expert={axes['expert']}, "
            f"model.variant={config.model.variant}"
        )


def _check_divides(name, size, of, count):
    if count % size:
        below, above = count // size * size, -(-count // size) * size
        nearest = " or ".join(str(n) for n in (below, above) if n)
        raise ValueError(
            f"`{name}` must divide the number of {of}; {nearest} would do, or "
            f"{name}={sharding.nearest_sizes(count, size)}. "
            f"Received: {name}={size}, {of}={count}"
        )


@functools.lru_cache(maxsize=4)
def on_mesh(function: Callable, strategy: MeshStrategy) -> Callable:
    """Makes a function of host tensors that computes on the mesh.

    It is traced once per shape. A second call with the same arguments returns
    the same function.

    Args:
        function: function of tensors whose first dimension is divisible by
            the size of the axis `batch`.
        strategy: `MeshStrategy`.

    Returns:
        A function to tensors on the mesh. Its arguments may be tensors on the
        host or on the mesh.
    """

    @functools.partial(tf.function, autograph=False)
    def traced(*args):
        return strategy.run(function, args)

    return lambda *args: traced(*strategy.put_batch(args, whole=True))


def padded_step(
    step: Callable,
    strategy: MeshStrategy,
    num_sequences: int,
    rows_multiple: int,
) -> tuple[Callable, int]:
    """Makes a step function for `moe_tf.decoding` that computes on the mesh.

    Args:
        step: `LanguageModel.step`.
        strategy: `MeshStrategy`.
        num_sequences: sequences that are decoded.
        rows_multiple: padding rows are added until the number of rows is a
            multiple of this.

    Returns:
        A function of tokens and states to logits on the host and states on
        the mesh, and the number of rows of the states.
    """
    compute = on_mesh(step, strategy)
    missing = -num_sequences % rows_multiple

    def run(tokens_N, states):
        logits, states = compute(np.pad(tokens_N, (0, missing)), states)
        with placement.host():
            return tf.constant(placement.get(logits)[:num_sequences]), states

    return run, num_sequences + missing


def score_on_mesh(
    scorer: Callable, strategy: MeshStrategy, inputs: Any
) -> np.ndarray:
    """Computes `scorer(inputs)` on the mesh."""
    return placement.get(on_mesh(scorer, strategy)(inputs))
