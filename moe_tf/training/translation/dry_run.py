"""The report of a translation model's dry run."""

import functools

import ml_collections

from moe_tf.data.parallel import batch_plan
from moe_tf.models import layer_specs
from moe_tf.models.translation import variants
from moe_tf.training import communication
from moe_tf.training import dry_run


def format_report(
    variant: variants.Variant, config: ml_collections.ConfigDict
) -> str:
    """Returns parameters, operations and bytes of a run, as text.

    With `config.mesh`, also what each device holds and sends.
    """
    vocabulary_size = config.data.vocabulary_size
    counts = variants.count(variant, vocabulary_size)
    sizes = dry_run.ModelSizes(
        variant.width,
        variant.layers,
        variants.kernel_shapes(variant, vocabulary_size),
        counts.ops_per_timestep,
        config.data.batch_tokens,
    )
    lengths = {
        batch_plan.padded_length(pieces + 1)
        for pieces in range(config.data.max_pieces)
    }
    rows = [
        (f"{variant.name}, width {variant.width}", ""),
        ("parameters", f"{counts.parameters:,}"),
        ("operations per timestep (multiply-adds)", f"{sizes.operations:,}"),
        *dry_run.memory_rows(sizes, config),
        ("wordpieces a batch and side, padded", f"{sizes.batch_tokens:,}"),
        dry_run.padding_row(sorted(lengths)),
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

    Gradients of both sides' embeddings are all-gathered as rows of
    wordpieces. Those of all kernels are all-reduced.
    """
    width = variant.width
    shapes = variants.kernel_shapes(variant, config.data.vocabulary_size)
    if not variant.tie_embeddings:
        shapes = shapes[2:]  # without source and target embedding
    kernels = communication.kernel_layouts(
        shapes, layer_specs.mixtures(variant.layers), width, axes
    )
    # The mean row of the softmax, for label smoothing, is all-reduced too.
    return communication.gradient_bytes_sent(
        kernels, width, 2 * config.data.batch_tokens * width, axes
    )
