"""The report of a language model's dry run."""

import functools

import ml_collections

from moe_tf.data.text import batching
from moe_tf.models import layer_specs
from moe_tf.models.language import variants
from moe_tf.training import communication
from moe_tf.training import dry_run


def format_report(
    variant: variants.Variant, config: ml_collections.ConfigDict
) -> str:
    """Returns parameters, operations and bytes of a run, as text.

    With `config.mesh`, also what each device holds and sends.
    """
    vocabulary_size = config.data.vocabulary_size
    counts = variants.count(variant)
    total = counts.parameters + variants.vocabulary_parameters(
        variant, vocabulary_size
    )
    sizes = dry_run.ModelSizes(
        variant.width,
        variant.layers,
        variants.kernel_shapes(variant, vocabulary_size),
        counts.ops_per_timestep,
        config.data.batch_words,
    )
    lengths = batching.bucket_lengths(config.data.max_words)
    rows = [
        (f"{variant.name}, width {variant.width}", ""),
        ("parameters", f"{counts.parameters:,}"),
        ("  with embedding and softmax, at most", f"{total:,}"),
        ("operations per word (multiply-adds)", f"{sizes.operations:,}"),
        *dry_run.memory_rows(sizes, config),
        ("words a batch, padding included", f"{sizes.batch_tokens:,}"),
        dry_run.padding_row(lengths),
        *dry_run.expert_rows(sizes, config),
        *dry_run.mesh_rows(
            sizes, config, functools.partial(gradient_bytes, variant, config)
        ),
    ]
    return dry_run.format_table(rows)


def gradient_bytes(
    variant: variants.Variant,
    config: ml_collections.ConfigDict,
    axes: dict[str, int],
) -> int:
    """Returns the bytes that a device sends to sum gradients in a step.

    Gradients of the embedding and of the sampled softmax are all-gathered as
    rows of words. Those of the drawn rows, of the whole softmax and of all
    other kernels are all-reduced.
    """
    width, vocabulary_size = variant.width, config.data.vocabulary_size
    _, softmax, *shapes = variants.kernel_shapes(variant, vocabulary_size)
    batch_values = config.data.batch_words * width
    num_sampled = config.model.num_sampled
    if num_sampled is None or num_sampled >= vocabulary_size:
        shapes, drawn, gathered = [softmax, *shapes], 0, batch_values
    else:
        drawn, gathered = num_sampled * width, 2 * batch_values
    kernels = communication.kernel_layouts(
        shapes, layer_specs.mixtures(variant.layers), width, axes
    )
    return communication.gradient_bytes_sent(kernels, drawn, gathered, axes)
