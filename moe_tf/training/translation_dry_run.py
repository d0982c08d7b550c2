"""What a translation run will hold and cost, before anything is allocated."""

from moe_tf.data import pair_plan
from moe_tf.models import translation_variants as variants
from moe_tf.training import dry_run


def describe(variant, config):
    """Parameters, operations and bytes of a translation run, as text."""
    size = config.data.vocabulary_size
    counts = variants.count(variant, size)
    lengths = sorted(
        {pair_plan.padded_length(n + 1) for n in range(config.data.max_pieces)}
    )
    return dry_run.table(
        [
            (f"{variant.name}, width {variant.width}", ""),
            ("parameters", f"{counts.parameters:,}"),
            (
                "operations per timestep (multiply-adds)",
                f"{counts.ops_per_timestep:,}",
            ),
            *dry_run.weight_rows(variants.kernel_shapes(variant, size), config),
            (
                "wordpieces a batch and side, padded",
                f"{config.data.batch_tokens:,}",
            ),
            dry_run.padded_row(lengths),
            *dry_run.expert_rows(
                variant.layers, config, config.data.batch_tokens
            ),
        ]
    )
