"""Refuses values in a config that would fail later, when work is done."""

import keras

from moe_tf import checks
from moe_tf import optimizers

OPTIMIZERS = {
    "adam": keras.optimizers.Adam,
    "factored_adam": optimizers.FactoredAdam,
}

# Of every trainer's config.
_COUNTS = (
    "train.steps",
    "train.evaluate_every",
    "train.log_every",
    "train.keep_checkpoints",
    "train.warmup_steps",
)
_COUNTS_OR_NONE = (
    "mesh.batch",
    "mesh.expert",
    "data.rows_multiple",
    "model.k",
    "model.num_groups",
)
_POSITIVE = ("train.learning_rate",)
_POSITIVE_OR_NONE = ("model.capacity_factor", "train.clip_norm")
_NOT_NEGATIVE_OR_NONE = ("model.importance_weight", "model.load_weight")


def check(
    config,
    *,
    counts=(),
    counts_from_zero=(),
    counts_or_none=(),
    positive=(),
    not_negative=(),
):
    """Checks what all trainers have, and the fields that are named.

    Args:
        config: `ConfigDict` of a trainer.
        counts: names such as `"data.max_words"`, whole numbers from 1 on.
        counts_from_zero: the same from 0 on.
        counts_or_none: whole numbers from 1 on, or None.
        positive: finite numbers above 0.
        not_negative: finite numbers of at least 0.

    Raises:
        ValueError: a value cannot be used; the message names the field.
    """
    checks.at_least("seed", config.seed, 0)
    _check_policy(config.dtype_policy)
    one_of("train.optimizer", config.train.optimizer, OPTIMIZERS)
    for field in (*_COUNTS, *counts):
        checks.at_least(field, value(config, field), 1)
    for field in counts_from_zero:
        checks.at_least(field, value(config, field), 0)
    for field in (*_COUNTS_OR_NONE, *counts_or_none):
        checks.at_least(field, value(config, field), 1, none_is_fine=True)
    for field in (*_POSITIVE, *positive):
        checks.positive(field, value(config, field))
    for field in _POSITIVE_OR_NONE:
        checks.positive(field, value(config, field), none_is_fine=True)
    for field in not_negative:
        checks.not_negative(field, value(config, field))
    for field in _NOT_NEGATIVE_OR_NONE:
        checks.not_negative(field, value(config, field), none_is_fine=True)
    fraction("model.dropout", config.model.dropout)
    steps, every = config.train.steps, config.train.evaluate_every
    if steps % every:
        raise ValueError(
            "`train.steps` must be a multiple of `train.evaluate_every`. "
            f"Received: train.steps={steps}, train.evaluate_every={every}"
        )


def value(config, field):
    """The value of a field such as `"train.steps"`."""
    group, _, name = field.partition(".")
    return config[group][name]


def one_of(field, found, names):
    """Raises `ValueError` unless `found` is among `names`."""
    if found not in names:
        raise ValueError(
            f"`{field}` must be one of {', '.join(names)}. "
            f"Received: {field}={found}"
        )


def fraction(field, found):
    """Raises `ValueError` unless `found` is at least 0 and below 1."""
    if not 0 <= found < 1:
        raise ValueError(
            f"`{field}` must be at least 0 and below 1. "
            f"Received: {field}={found}"
        )


def _check_policy(name):
    try:
        keras.dtype_policies.get(name)
    except ValueError as error:
        raise ValueError(
            "`dtype_policy` must be one of Keras's, such as float32 or "
            f"mixed_bfloat16. Received: dtype_policy={name}"
        ) from error
