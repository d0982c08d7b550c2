"""What a config says of a mesh, and what runs on one."""

import functools

import numpy as np
import tensorflow as tf

from moe_tf import sharding
from moe_tf.distribute import MeshStrategy
from moe_tf.distribute import placement
from moe_tf.models import layer_specs

# Divides the rows of every batch where a mesh or groups are used. Not the
# mesh's own size: batches are the same on any mesh.
_ROWS = 8


def axes(config):
    """The axes of `config.mesh` by size; None where there is no mesh."""
    found = {name: size for name, size in config.mesh.items() if size}
    return {"batch": 1, **found} if found else None


def strategy(config):
    """The `MeshStrategy` of `config.mesh`; None where there is no mesh.

    To be made before anything else that uses TensorFlow.

    Raises:
        ValueError: the axes cannot be used, or there are too few devices.
        RuntimeError: TensorFlow has started already.
    """
    sizes = axes(config)
    return None if sizes is None else MeshStrategy(sizes)


def check(config, layers):
    """Refuses what a mesh cannot divide; sets what a mesh needs.

    That is `data.rows_multiple`, and `model.num_groups` where words may be
    dropped or experts choose: which of them must not depend on the mesh.

    Args:
        config: its numbers are whole and positive.
        layers: what the model consists of, as data.

    Raises:
        ValueError: a size does not divide what it must.
    """
    sizes, model = axes(config) or {"batch": 1}, config.model
    on_mesh = axes(config) is not None
    mixtures = layer_specs.mixtures(layers)
    chooses = model.capacity_factor is not None or model.gating == "batchwise"
    if on_mesh and mixtures and chooses and model.num_groups is None:
        model.num_groups = config.data.rows_multiple or _ROWS
    groups = model.num_groups
    if config.data.rows_multiple is None and (on_mesh or groups):
        config.data.rows_multiple = _ROWS
    batch, rows = sizes["batch"], config.data.rows_multiple or 1
    _check_divides("mesh.batch", batch, "data.rows_multiple", rows)
    if groups is not None:
        _check_divides("mesh.batch", batch, "model.num_groups", groups)
        _check_divides("model.num_groups", groups, "data.rows_multiple", rows)
    axis = sharding.expert_axis(sizes)
    for layer in mixtures:
        _check_divides(
            f"mesh.{axis}", sizes[axis], "experts", layer.num_experts
        )
    if "expert" in sizes and not mixtures:
        raise ValueError(
            "`mesh.expert` is for variants with a choice of experts; leave it "
            f"out here. Received: mesh.expert={sizes['expert']}, "
            f"model.variant={config.model.variant}"
        )


def _check_divides(name, size, of, number):
    if number % size:
        below, above = number // size * size, -(-number // size) * size
        nearest = " or ".join(str(n) for n in (below, above) if n)
        raise ValueError(
            f"`{name}` must divide the number of {of}; {nearest} would do, or "
            f"{name}={sharding.nearest_sizes(number, size)}. "
            f"Received: {name}={size}, {of}={number}"
        )


@functools.lru_cache(maxsize=4)
def on_mesh(function, strategy):
    """`function` of host tensors, computed on the mesh; traced per shape.

    Called again with the same arguments it gives the same, traced already.

    Args:
        function: of tensors whose first dimension the axis `batch` divides.
        strategy: `MeshStrategy`

    Returns:
        A function to tensors on the mesh. Tensors that are there already may
        be among its arguments.
    """

    @functools.partial(tf.function, autograph=False)
    def traced(*args):
        return strategy.run(function, args)

    return lambda *args: traced(*strategy.put_batch(args, whole=True))


def padded_step(step, strategy, num_sequences, rows_multiple):
    """A step function for `decoding`, computed on the mesh.

    Args:
        step: `LanguageModel.step`
        strategy: `MeshStrategy`
        num_sequences: int
        rows_multiple: int, by which the rows can be divided once empty ones
            are added.

    Returns:
        A function of tokens and states to logits on the host and states on
        the mesh, and the number of rows that the states have.
    """
    compute = on_mesh(step, strategy)
    missing = -num_sequences % rows_multiple

    def run(tokens_N, states):
        logits, states = compute(np.pad(tokens_N, (0, missing)), states)
        with placement.host():
            return tf.constant(placement.get(logits)[:num_sequences]), states

    return run, num_sequences + missing


def score(scorer, strategy, inputs):
    """`scorer(inputs)`, computed on the mesh, as a numpy array."""
    return placement.get(on_mesh(scorer, strategy)(inputs))
