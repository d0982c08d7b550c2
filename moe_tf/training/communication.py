"""Sizes of what each device of a mesh holds and sends, from a config alone.

Collectives are counted as ring algorithms. To all-reduce `size` bytes over
`n` devices, each device sends `2 (n - 1) / n * size` bytes. To all-gather or
exchange a result of `size` bytes, each device sends `(n - 1) / n * size`.
"""

import math
from typing import NamedTuple

import ml_collections

from moe_tf import sharding
from moe_tf.dispatch import capacity
from moe_tf.distribute import layout_map
from moe_tf.models import layer_specs
from moe_tf.routing import registry

# Weights and gradients are float32. So are activations, except under 16-bit
# policies.
_BYTES = 4


class Kernel(NamedTuple):
    """A kernel and its layout on a mesh.

    Attributes:
        shape: tuple of ints, of the whole kernel.
        layout: tuple with the mesh axis that shards each dimension, or None.
    """

    shape: tuple[int, ...]
    layout: tuple[str | None, ...]

    @property
    def is_sharded(self) -> bool:
        return any(self.layout)

    def shard_shape(self, axes: dict[str, int]) -> tuple[int, ...]:
        """Returns the shape of the part that one device holds."""
        return tuple(
            size // axes[axis] if axis else size
            for size, axis in zip(self.shape, self.layout, strict=True)
        )


def kernel_layouts(
    shapes: list[tuple[int, ...]],
    expert_layers: list[layer_specs.Experts],
    width: int,
    axes: dict[str, int],
) -> list[Kernel]:
    """Lays the kernels of a model out on a mesh.

    Args:
        shapes: shapes of all kernels.
        expert_layers: the model's layers of experts.
        width: the model's width.
        axes: the mesh's axes by size.
    """
    sharded = layout_map.default_layout_map(axes).match(
        "experts/expert_in_kernel"
    )[1]
    expert_shapes = set()
    for layer in expert_layers:
        sizes = width, layer.hidden_units
        expert_shapes.add((layer.num_experts, *sizes))
        expert_shapes.add((layer.num_experts, *reversed(sizes)))
    return [
        Kernel(
            shape, sharded if shape in expert_shapes else (None,) * len(shape)
        )
        for shape in shapes
    ]


def token_bytes_sent(
    layer: layer_specs.Experts,
    width: int,
    batch_tokens: int,
    config: ml_collections.ConfigDict,
    axes: dict[str, int],
) -> int:
    """Returns the bytes that a device sends for a layer's tokens in a step.

    On a mesh of one axis, a step has four all-to-alls, two of them backward,
    of the slots that a device has for all experts. On a mesh with an axis
    `expert`, the devices along this axis have the same tokens. Slots then
    reach the experts without an exchange, and the outputs are all-gathered
    once forward and once backward.

    Args:
        layer: the layer of experts.
        width: the model's width.
        batch_tokens: tokens of a batch.
        config: the run's config.
        axes: the mesh's axes by size.
    """
    batch, size = axes["batch"], axes[sharding.expert_axis(axes)]
    num_groups = config.moe.num_groups or batch
    slots = _slots_per_expert(
        layer, batch_tokens // num_groups, config.moe.capacity_factor
    )
    held = num_groups * layer.num_experts * slots * width * _BYTES // batch
    num_collectives = 2 if "expert" in axes else 4
    return num_collectives * held * (size - 1) // size


def gradient_bytes_sent(
    kernels: list[Kernel],
    reduced_values: int,
    gathered_values: int,
    axes: dict[str, int],
) -> int:
    """Returns the bytes that a device sends to sum gradients in a step.

    The gradient of a kernel is all-reduced over `batch`, unless the kernel is
    sharded along this axis.

    Args:
        kernels: the kernels whose gradients are dense.
        reduced_values: further values of gradients that are all-reduced.
        gathered_values: values of gradients that are all-gathered, as rows of
            an embedding are.
        axes: the mesh's axes by size.
    """
    reduced_values += sum(
        math.prod(kernel.shard_shape(axes))
        for kernel in kernels
        if "batch" not in kernel.layout
    )
    size = axes["batch"]
    sent = (2 * reduced_values + gathered_values) * (size - 1)
    return sent * _BYTES // size


def _slots_per_expert(layer, num_tokens, capacity_factor):
    """Slots that a group of tokens has at each expert, in training."""
    if capacity_factor is not None:
        return capacity.expert_capacity(
            num_tokens * layer.experts_per_word,
            layer.num_experts,
            capacity_factor,
        )
    # A seed, so that none is drawn from the program's own random numbers.
    router = registry.make_router(
        layer.num_experts, layer.gating, layer.branching, seed=0, k=layer.k
    )
    max_tokens = router.max_tokens_per_expert(num_tokens, training=True)
    # `None`: all tokens may choose the same expert.
    return num_tokens if max_tokens is None else max_tokens
