"""What a run will hold and cost, told before anything is allocated."""

import math

from moe_tf.data.text import batching
from moe_tf.dispatch import capacity
from moe_tf.models import layer_specs
from moe_tf.models.language import variants
from moe_tf.routing import two_level
from moe_tf.training import communication
from moe_tf.training import meshes

_FLOAT_BYTES = 4  # weights and slots are float32 under every dtype policy

# Numbers that an optimizer keeps for a kernel.
_STATE_OF_KERNEL = {
    "adam": lambda shape: 2 * math.prod(shape),
    # The means along rows and columns of each matrix.
    "factored_adam": lambda shape: math.prod(shape[:-2]) * sum(shape[-2:]),
}


def describe(variant, config):
    """Parameters, operations and bytes of a language model's run, as text.

    On a mesh also what each device holds and sends, by its config alone.
    """
    counts = variants.count(variant)
    size = config.data.vocabulary_size
    total = counts.parameters + variants.vocabulary_parameters(variant, size)
    rows = [
        (f"{variant.name}, width {variant.width}", ""),
        ("parameters", f"{counts.parameters:,}"),
        ("  with embedding and softmax, at most", f"{total:,}"),
        ("operations per word (multiply-adds)", f"{counts.ops_per_timestep:,}"),
        *weight_rows(variants.kernel_shapes(variant, size), config),
        ("words a batch, padding included", f"{config.data.batch_words:,}"),
        padded_row(batching.bucket_lengths(config.data.max_words)),
        *expert_rows(variant.layers, config, config.data.batch_words),
    ]
    axes = meshes.axes(config)
    if axes is not None:
        rows += mesh_rows(
            variant,
            variants.kernel_shapes(variant, size),
            counts.ops_per_timestep,
            config.data.batch_words,
            communication.sent_for_gradients(variant, config, axes),
            config,
        )
    return table(rows)


def table(rows):
    """Rows of a name and what it is, as text."""
    return "\n".join(f"{name:40}{value}".rstrip() for name, value in rows)


def weight_rows(shapes, config):
    """What weights of these shapes, and training them, take."""
    weights = _FLOAT_BYTES * sum(map(math.prod, shapes))
    state = _FLOAT_BYTES * sum(
        map(_STATE_OF_KERNEL[config.train.optimizer], shapes)
    )
    return [
        ("weights", _bytes(weights)),
        ("  their gradients", _bytes(weights)),
        (f"  state of {config.train.optimizer}", _bytes(state)),
    ]


def padded_row(lengths):
    """The lengths that sentences are padded to."""
    return ("  padded to one of", ", ".join(map(str, lengths)))


def expert_rows(layers, config, batch_tokens):
    """What layers of experts see of a batch of so many tokens, and keep."""
    rows = []
    for layer in layers:
        if isinstance(layer, variants.Experts):
            rows += _expert_rows(layer, config, batch_tokens)
    return rows


def _expert_rows(layer, config, batch_tokens):
    rows_a_batch = layer.experts_per_word * batch_tokens
    factor = config.model.capacity_factor
    kept = ", not kept" if config.model.recompute else ""
    limit = "none is dropped"
    if factor is not None:
        slots = capacity.expert_capacity(
            rows_a_batch, layer.num_experts, factor
        )
        limit = f"at most {slots:,} an expert"
    return [
        ("words an expert sees in a batch, mean",
         f"{rows_a_batch / layer.num_experts:,.0f}; {limit}"),
        ("experts' hidden activations",
         _bytes(rows_a_batch * layer.hidden_units * _FLOAT_BYTES) + kept),
    ]  # fmt: skip


def mesh_rows(
    variant, shapes, operations, batch_tokens, gradient_bytes, config
):
    """What each device of the config's mesh holds and sends.

    Args:
        variant: has `width` and `layers`.
        shapes: of all its kernels.
        operations: int, of a word, without or with the softmax.
        batch_tokens: int, tokens that a layer of experts sees in a batch.
        gradient_bytes: int, sent by a device to sum gradients.
        config: the run's config.
    """
    axes = meshes.axes(config)
    mixtures = layer_specs.mixtures(variant.layers)
    kernels = communication.kernels(shapes, mixtures, variant.width, axes)
    held = sum(communication.per_device(*kernel, axes) for kernel in kernels)
    state = _STATE_OF_KERNEL[config.train.optimizer]
    slots = sum(
        state((shape[0] // axes[layout[0]], *shape[1:]))
        if layout[0]
        else state(shape)
        for shape, layout in kernels
    )
    rows = [
        ("mesh", f"{_text(axes)}, {math.prod(axes.values())} devices"),
        ("  each holds weights", _bytes(held * _FLOAT_BYTES)),
        ("    their gradients", _bytes(held * _FLOAT_BYTES)),
        (
            f"    state of {config.train.optimizer}",
            _bytes(slots * _FLOAT_BYTES),
        ),
    ]
    for shape, layout in kernels:
        if layout[0]:
            size = communication.per_device(shape, layout, axes) * _FLOAT_BYTES
            rows.append((f"    kernels of experts {shape}",
                         f"by {layout[0]}, {_bytes(size)} each"))  # fmt: skip
    rows.append(("    all other kernels", "whole on each device"))
    if "expert" in axes:
        rows.append(_repeated_row(variant, mixtures, operations, axes))
    rows.append(("sent by each device in a step, at most", ""))
    for layer in mixtures:
        size = communication.sent_for_tokens(
            layer, variant.width, batch_tokens, config, axes
        )
        how = "two gathers of answers" if "expert" in axes else "4 all-to-alls"
        rows.append(("  for the words of a layer of experts",
                     f"{_bytes(size)}, {how}"))  # fmt: skip
        told = layer.branching and two_level.describe_spread_branches(
            layer.branching, axes
        )
        if told:
            rows.append(("    its groups of experts are", told))
    rows.append(("  to sum gradients", _bytes(gradient_bytes)))
    return rows


def _repeated_row(variant, mixtures, operations, axes):
    experts = sum(
        layer.experts_per_word * 2 * variant.width * layer.hidden_units
        for layer in mixtures
    )
    dense = 1 - experts / operations
    return (f"  repeated by {axes['expert']} devices along expert",
            f"all but experts: {dense:.0%} of the operations above, and the "
            "softmax")  # fmt: skip


def _text(axes):
    return ", ".join(f"{name} {size}" for name, size in axes.items())


def _bytes(number):
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            return f"{number:,.1f} {unit}"
        number /= 1024
