"""What a run will hold and cost, told before anything is allocated."""

import math

from moe_tf import dispatch
from moe_tf.data import batching
from moe_tf.models import language_model_variants as variants

_FLOAT_BYTES = 4  # weights and slots are float32 under every dtype policy

# Numbers that an optimizer keeps for a kernel.
_STATE_OF_KERNEL = {
    "adam": lambda shape: 2 * math.prod(shape),
    # The means along rows and columns of each matrix.
    "factored_adam": lambda shape: math.prod(shape[:-2]) * sum(shape[-2:]),
}


def describe(task, config):
    """Parameters, operations and bytes of a language model's run, as text."""
    variant = task.variant()
    counts = variants.count(variant)
    vocabulary = variants.vocabulary_parameters(
        variant, config.data.vocabulary_size
    )
    total = counts.parameters + vocabulary
    weights = total * _FLOAT_BYTES
    state = _FLOAT_BYTES * sum(
        _STATE_OF_KERNEL[config.train.optimizer](shape)
        for shape in variants.kernel_shapes(
            variant, config.data.vocabulary_size
        )
    )
    lengths = batching.bucket_lengths(config.data.max_words)
    rows = [
        (f"{variant.name}, width {variant.width}", ""),
        ("parameters", f"{counts.parameters:,}"),
        ("  with embedding and softmax, at most", f"{total:,}"),
        ("operations per word (multiply-adds)", f"{counts.ops_per_timestep:,}"),
        ("weights", _bytes(weights)),
        ("  their gradients", _bytes(weights)),
        (f"  state of {config.train.optimizer}", _bytes(state)),
        ("words a batch, padding included", f"{config.data.batch_words:,}"),
        ("  padded to one of", ", ".join(map(str, lengths))),
    ]
    for layer in variant.layers:
        if isinstance(layer, variants.Experts):
            rows += _expert_rows(layer, config)
    return "\n".join(f"{name:40}{value}".rstrip() for name, value in rows)


def _expert_rows(layer, config):
    rows_a_batch = layer.experts_per_word * config.data.batch_words
    capacity = config.model.capacity_factor
    kept = ", not kept" if config.model.recompute else ""
    limit = "none is dropped"
    if capacity is not None:
        slots = dispatch.capacity(rows_a_batch, layer.num_experts, capacity)
        limit = f"at most {slots:,} an expert"
    return [
        ("words an expert sees in a batch, mean",
         f"{rows_a_batch / layer.num_experts:,.0f}; {limit}"),
        ("experts' hidden activations",
         _bytes(rows_a_batch * layer.hidden_units * _FLOAT_BYTES) + kept),
    ]  # fmt: skip


def _bytes(number):
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            return f"{number:,.1f} {unit}"
        number /= 1024
