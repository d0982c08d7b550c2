"""What a mesh holds and sends, computed before there is one.

Ring algorithms: of `size` bytes that `n` devices reduce, each sends
`2 (n - 1) / n * size`; gathered or exchanged, `(n - 1) / n` of the result.
"""

import math

from moe_tf import sharding
from moe_tf.dispatch import capacity
from moe_tf.distribute import layout_map
from moe_tf.models import layer_specs
from moe_tf.models.language import variants as language_variants
from moe_tf.models.translation import variants as translation_variants
from moe_tf.routing import expert_choice

_BYTES = 4  # weights, gradients and, but under 16-bit policies, activations


def kernels(shapes, mixtures, width, axes):
    """The kernels of a model on a mesh.

    Args:
        shapes: those of all kernels.
        mixtures: the model's layers of experts, as data.
        width: int, of the model.
        axes: dict from name to size.

    Returns:
        list of `(shape, layout)`; a layout is a tuple of axes and None.
    """
    expert = layout_map.default_layout_map(axes).match(
        "experts/expert_in_kernel"
    )[1]
    found = []
    for shape in shapes:
        is_expert = any(
            shape[0] == layer.num_experts
            and sorted(shape[1:]) == sorted((width, layer.hidden_units))
            for layer in mixtures
            if len(shape) == 3
        )
        found.append((shape, expert if is_expert else (None,) * len(shape)))
    return found


def per_device(shape, layout, axes):
    """Numbers of a kernel that one device holds."""
    return math.prod(shape) // math.prod(axes[axis] for axis in layout if axis)


def sent_for_tokens(layer, width, batch_tokens, config, axes):
    """Bytes that a device sends for the tokens of one layer in a step.

    On one axis these are four all-to-alls, two of them backward, of the slots
    that a device has for all experts. With an axis `expert` devices along it
    have the same tokens: slots need no exchange on their way to the experts,
    and two times, forward and backward, answers are gathered.
    """
    batch, size = axes["batch"], axes[sharding.expert_axis(axes)]
    groups = config.model.num_groups or batch
    slots = _slots(layer, batch_tokens // groups, config.model.capacity_factor)
    held = groups * layer.num_experts * slots * width * _BYTES // batch
    times = 2 if "expert" in axes else 4
    return times * held * (size - 1) // size


def _slots(layer, tokens, capacity_factor):
    """Slots of a group of tokens at every expert, in training."""
    if capacity_factor is not None:
        return capacity.expert_capacity(
            tokens * layer.experts_per_word, layer.num_experts, capacity_factor
        )
    if layer.gating == "batchwise":
        # Experts take equally many, in two levels of those of their group.
        for number in layer.branching or (layer.num_experts,):
            tokens = expert_choice.tokens_per_expert(tokens, layer.k, number)
    return tokens  # an expert may be chosen by all


def sent_for_gradients(variant, config, axes):
    """Bytes that a device sends to sum a language model's gradients.

    Those of embedding and sampled softmax are gathered as rows of words; the
    drawn rows, the whole softmax and all other kernels are reduced.
    """
    width, vocabulary_size = variant.width, config.data.vocabulary_size
    _, softmax, *others = language_variants.kernel_shapes(
        variant, vocabulary_size
    )
    words = config.data.batch_words * width
    sampled = config.model.num_sampled
    if sampled is None or sampled >= vocabulary_size:
        others, drawn, gathered = [softmax, *others], 0, words
    else:
        drawn, gathered = sampled * width, 2 * words
    mixtures = layer_specs.mixtures(variant.layers)
    found = kernels(others, mixtures, width, axes)
    return _sent(_reduced(found, axes) + drawn, gathered, axes)


def sent_for_translation_gradients(variant, config, axes):
    """The same of a translation model.

    Gradients of both sides' embeddings are gathered as rows of wordpieces.
    """
    width = variant.width
    shapes = translation_variants.kernel_shapes(
        variant, config.data.vocabulary_size
    )
    if not variant.tie_embeddings:
        shapes = shapes[2:]  # without source and target embedding
    mixtures = layer_specs.mixtures(variant.layers)
    found = kernels(shapes, mixtures, width, axes)
    # Besides the kernels, the mean row of the softmax, for label smoothing.
    reduced = _reduced(found, axes) + width
    gathered = 2 * config.data.batch_tokens * width
    return _sent(reduced, gathered, axes)


def _reduced(kernels, axes):
    """Numbers that are summed over `batch`, those of its experts not."""
    return sum(
        per_device(shape, layout, axes)
        for shape, layout in kernels
        if "batch" not in layout
    )


def _sent(reduced, gathered, axes):
    size = axes["batch"]
    return (2 * reduced + gathered) * _BYTES * (size - 1) // size
