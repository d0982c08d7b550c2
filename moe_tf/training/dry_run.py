"""The report of a dry run: what a run holds, computes and sends.

The report is a table of a name and a value a row. Each function gives the
rows of one part; `language/dry_run.py` and `translation/dry_run.py` put them
together. Nothing is allocated, and a mesh need not exist.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import ml_collections

from moe_tf.dispatch import capacity
from moe_tf.models import layer_specs
from moe_tf.routing import two_level
from moe_tf.training import communication
from moe_tf.training import meshes
from moe_tf.training import optimizer

_FLOAT_BYTES = 4  # weights and slots are float32 under every dtype policy

Rows = list[tuple[str, str]]


class ModelSizes(NamedTuple):
    """The sizes of a model and of its batches.

    Attributes:
        width: width of every layer's output.
        layers: the layers as data, see `layer_specs`.
        kernel_shapes: shapes of all kernels, those of embedding and softmax
            included.
        operations: multiply-adds of a token.
        batch_tokens: tokens of a batch, padding included.
    """

    width: int
    layers: tuple
    kernel_shapes: list[tuple[int, ...]]
    operations: int
    batch_tokens: int

    @property
    def expert_layers(self) -> list[layer_specs.Experts]:
        return layer_specs.mixtures(self.layers)


def format_table(rows: Rows) -> str:
    """Formats rows as text, the values in a column."""
    return "\n".join(f"{name:40}{value}".rstrip() for name, value in rows)


def memory_rows(sizes: ModelSizes, config: ml_collections.ConfigDict) -> Rows:
    """Rows of the memory that weights and their training take."""
    return _memory_rows(sizes.kernel_shapes, config, "weights", "  ")


def padding_row(lengths: list[int]) -> tuple[str, str]:
    """Row of the lengths that sequences are padded to."""
    return "  padded to one of", ", ".join(map(str, lengths))


def expert_rows(sizes: ModelSizes, config: ml_collections.ConfigDict) -> Rows:
    """Rows of the tokens that experts get, a pair for each layer."""
    rows = []
    for layer in sizes.expert_layers:
        assignments = layer.experts_per_word * sizes.batch_tokens
        mean = assignments / layer.num_experts
        activations = _format_bytes(
            assignments * layer.hidden_units * _FLOAT_BYTES
        )
        if config.moe.recompute:
            activations += ", not kept"
        rows += [
            (
                "words an expert sees in a batch, mean",
                f"{mean:,.0f}; {_capacity_text(layer, assignments, config)}",
            ),
            ("experts' hidden activations", activations),
        ]
    return rows


def mesh_rows(
    sizes: ModelSizes,
    config: ml_collections.ConfigDict,
    gradient_bytes: Callable[[dict[str, int]], int],
) -> Rows:
    """Rows of what each device of `config.mesh` holds and sends.

    Args:
        sizes: of the model.
        config: the run's config.
        gradient_bytes: function of the mesh's axes to the bytes that a device
            sends to sum gradients.

    Returns:
        Rows; none where the config has no mesh.
    """
    axes = meshes.mesh_axes(config)
    if axes is None:
        return []
    return [
        *_held_rows(sizes, config, axes),
        *_repeated_rows(sizes, axes),
        *_sent_rows(sizes, config, axes),
        ("  to sum gradients", _format_bytes(gradient_bytes(axes))),
    ]


def _memory_rows(shapes, config, name, indent):
    """Rows of kernels of these shapes, their gradients and their state."""
    chosen = config.train.optimizer
    weights = sum(map(math.prod, shapes))
    state = sum(optimizer.state_size(chosen, shape) for shape in shapes)
    return [
        (name, _format_bytes(weights * _FLOAT_BYTES)),
        (f"{indent}their gradients", _format_bytes(weights * _FLOAT_BYTES)),
        (f"{indent}state of {chosen}", _format_bytes(state * _FLOAT_BYTES)),
    ]


def _capacity_text(layer, assignments, config):
    factor = config.moe.capacity_factor
    if factor is None:
        return "none is dropped"
    slots = capacity.expert_capacity(assignments, layer.num_experts, factor)
    return f"at most {slots:,} an expert"


def _held_rows(sizes, config, axes):
    kernels = communication.kernel_layouts(
        sizes.kernel_shapes, sizes.expert_layers, sizes.width, axes
    )
    shapes = [kernel.shard_shape(axes) for kernel in kernels]
    by_size = ", ".join(f"{name} {size}" for name, size in axes.items())
    rows = [
        ("mesh", f"{by_size}, {math.prod(axes.values())} devices"),
        *_memory_rows(shapes, config, "  each holds weights", "    "),
    ]
    for kernel, shape in zip(kernels, shapes, strict=True):
        if kernel.is_sharded:
            held = _format_bytes(math.prod(shape) * _FLOAT_BYTES)
            rows.append(
                (
                    f"    kernels of experts {kernel.shape}",
                    f"by {kernel.layout[0]}, {held} each",
                )
            )
    return [*rows, ("    all other kernels", "whole on each device")]


def _repeated_rows(sizes, axes):
    """Row of the work that all devices along `expert` repeat."""
    if "expert" not in axes:
        return []
    expert_operations = sum(
        layer.experts_per_word * 2 * sizes.width * layer.hidden_units
        for layer in sizes.expert_layers
    )
    repeated = 1 - expert_operations / sizes.operations
    return [
        (
            f"  repeated by {axes['expert']} devices along expert",
            f"all but experts: {repeated:.0%} of the operations above, and "
            "the softmax",
        )
    ]


def _sent_rows(sizes, config, axes):
    """Rows of what the layers of experts send."""
    collectives = (
        "two gathers of answers" if "expert" in axes else "4 all-to-alls"
    )
    rows = [("sent by each device in a step, at most", "")]
    for layer in sizes.expert_layers:
        sent = communication.token_bytes_sent(
            layer, sizes.width, sizes.batch_tokens, config, axes
        )
        rows.append(
            (
                "  for the words of a layer of experts",
                f"{_format_bytes(sent)}, {collectives}",
            )
        )
        spread = layer.branching and two_level.describe_split_branches(
            layer.branching, axes
        )
        if spread:
            rows.append(("    its branches of experts are", spread))
    return rows


def _format_bytes(size):
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:,.1f} {unit}"
        size /= 1024
