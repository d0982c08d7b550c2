"""What a mesh holds and sends, computed before there is one.

Ring algorithms: of `size` bytes that `n` devices reduce, each sends
`2 (n - 1) / n * size`; gathered or exchanged, `(n - 1) / n` of the result.
"""

import math

from moe_tf import plans
from moe_tf import sharding
from moe_tf.distribute import layout_map
from moe_tf.models import language_model_variants as variants

_BYTES = 4  # weights, gradients and, but under 16-bit policies, activations


def kernels(variant, vocabulary_size, axes):
    """The kernels of a model on a mesh.

    Args:
        variant: `language_model_variants.Variant`
        vocabulary_size: int
        axes: dict from name to size.

    Returns:
        list of `(shape, layout)`; a layout is a tuple of axes and None.
    """
    expert = layout_map.default(axes).match("experts/expert_in_kernel")[1]
    found = []
    for shape in variants.kernel_shapes(variant, vocabulary_size):
        is_expert = any(
            shape[0] == layer.num_experts
            and sorted(shape[1:]) == sorted((variant.width, layer.hidden_units))
            for layer in mixtures(variant)
            if len(shape) == 3
        )
        found.append((shape, expert if is_expert else (None,) * len(shape)))
    return found


def per_device(shape, layout, axes):
    """Numbers of a kernel that one device holds."""
    return math.prod(shape) // math.prod(axes[axis] for axis in layout if axis)


def mixtures(variant):
    """The layers of a model that have experts."""
    return [
        layer for layer in variant.layers if isinstance(layer, variants.Experts)
    ]


def sent_for_tokens(layer, width, config, axes):
    """Bytes that a device sends for the tokens of one layer in a step.

    On one axis these are four all-to-alls, two of them backward, of the slots
    that a device has for all experts. With an axis `expert` devices along it
    have the same tokens: slots need no exchange on their way to the experts,
    and two times, forward and backward, answers are gathered.
    """
    batch, size = axes["batch"], axes[sharding.expert_axis(axes)]
    groups = config.model.num_groups or batch
    tokens = config.data.batch_words // groups
    slots = tokens  # an expert may be chosen by all
    if config.model.capacity_factor is not None:
        slots = plans.capacity(
            tokens * layer.experts_per_word,
            layer.num_experts,
            config.model.capacity_factor,
        )
    held = groups * layer.num_experts * slots * width * _BYTES // batch
    times = 2 if "expert" in axes else 4
    return times * held * (size - 1) // size


def sent_for_gradients(variant, config, axes):
    """Bytes that a device sends to sum the gradients of a step.

    Those of embedding and sampled softmax are gathered as rows of words; the
    drawn rows, the whole softmax and all other kernels are reduced, experts'
    over `batch` if they have an axis of their own, else not at all.
    """
    size, width = axes["batch"], variant.width
    embedding, *others = kernels(variant, config.data.vocabulary_size, axes)
    softmax, *others = others
    reduced = sum(
        per_device(shape, layout, axes)
        for shape, layout in others
        if "batch" not in layout
    )
    words = config.data.batch_words * width
    sampled = config.model.num_sampled
    if sampled is None or sampled >= config.data.vocabulary_size:
        reduced += math.prod(softmax[0])
        gathered = words
    else:
        reduced += sampled * width
        gathered = 2 * words
    return (2 * reduced + gathered) * _BYTES * (size - 1) // size
