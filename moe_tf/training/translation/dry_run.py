"""What a translation run will hold and cost, before anything is allocated."""

from moe_tf.data.parallel import batch_plan
from moe_tf.models.translation import variants
from moe_tf.training import communication
from moe_tf.training import dry_run
from moe_tf.training import meshes


def describe(variant, config):
    """Parameters, operations and bytes of a translation run, as text."""
    size = config.data.vocabulary_size
    counts = variants.count(variant, size)
    lengths = sorted(
        {batch_plan.padded_length(n + 1) for n in range(config.data.max_pieces)}
    )
    shapes = variants.kernel_shapes(variant, size)
    tokens = config.data.batch_tokens
    operations = counts.ops_per_timestep
    rows = [
        (f"{variant.name}, width {variant.width}", ""),
        ("parameters", f"{counts.parameters:,}"),
        ("operations per timestep (multiply-adds)", f"{operations:,}"),
        *dry_run.weight_rows(shapes, config),
        ("wordpieces a batch and side, padded", f"{tokens:,}"),
        dry_run.padded_row(lengths),
        *dry_run.expert_rows(variant.layers, config, tokens),
    ]
    axes = meshes.axes(config)
    if axes is not None:
        sent = communication.sent_for_translation_gradients(
            variant, config, axes
        )
        rows += dry_run.mesh_rows(
            variant, shapes, operations, tokens, sent, config
        )
    return dry_run.table(rows)
