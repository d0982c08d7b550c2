"""Checks of a config's fields, made before any work is done."""

from collections.abc import Collection

import keras
import ml_collections

from moe_tf import checks
from moe_tf.training import optimizer
from moe_tf.training import workdir

# Fields that the config of every trainer has.
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
    "moe.num_experts",
    "moe.k",
    "moe.hidden_units",
    "moe.num_groups",
)
_POSITIVE = ("train.learning_rate",)
_POSITIVE_OR_NONE = ("moe.capacity_factor", "train.clip_norm")
_NOT_NEGATIVE_OR_NONE = ("moe.importance_weight", "moe.load_weight")


def check_config(
    config: ml_collections.ConfigDict,
    *,
    counts: Collection[str] = (),
    counts_from_zero: Collection[str] = (),
    counts_or_none: Collection[str] = (),
    positive: Collection[str] = (),
    not_negative: Collection[str] = (),
) -> None:
    """Checks the fields that every trainer has, and the given ones.

    Args:
        config: the run's config.
        counts: names such as `"data.max_words"` of whole numbers of at least
            1.
        counts_from_zero: names of whole numbers of at least 0.
        counts_or_none: names of whole numbers of at least 1, or None.
        positive: names of finite numbers above 0.
        not_negative: names of finite numbers of at least 0.

    Raises:
        ValueError: a value cannot be used. The message names the field.
    """
    _check_names(config)
    checks.at_least("seed", config.seed, 0)
    _check_dtype_policy(config.dtype_policy)
    check_choice(
        "train.optimizer", config.train.optimizer, optimizer.OPTIMIZERS
    )
    for field in (*_COUNTS, *counts):
        checks.at_least(field, field_value(config, field), 1)
    for field in counts_from_zero:
        checks.at_least(field, field_value(config, field), 0)
    for field in (*_COUNTS_OR_NONE, *counts_or_none):
        checks.at_least(field, field_value(config, field), 1, allow_none=True)
    for field in (*_POSITIVE, *positive):
        checks.positive(field, field_value(config, field))
    for field in _POSITIVE_OR_NONE:
        checks.positive(field, field_value(config, field), allow_none=True)
    for field in not_negative:
        checks.not_negative(field, field_value(config, field))
    for field in _NOT_NEGATIVE_OR_NONE:
        checks.not_negative(field, field_value(config, field), allow_none=True)
    check_fraction("model.dropout", config.model.dropout)
    steps, every = config.train.steps, config.train.evaluate_every
    if steps % every:
        raise ValueError(
            "`train.steps` must be a multiple of `train.evaluate_every`. "
            f"Received: train.steps={steps}, train.evaluate_every={every}"
        )


def field_value(config: ml_collections.ConfigDict, field: str) -> object:
    """Returns the value of a field such as `"train.steps"`."""
    group, _, name = field.partition(".")
    return config[group][name]


def check_choice(field: str, value: str, choices: Collection[str]) -> None:
    """Raises `ValueError` unless `value` is among `choices`."""
    if value not in choices:
        raise ValueError(
            f"`{field}` must be one of {', '.join(choices)}. "
            f"Received: {field}={value}"
        )


def check_fraction(field: str, value: float) -> None:
    """Raises `ValueError` unless `value` is at least 0 and below 1."""
    if not 0 <= value < 1:
        raise ValueError(
            f"`{field}` must be at least 0 and below 1. "
            f"Received: {field}={value}"
        )


def _check_names(config):
    for former, present in workdir.RENAMED_FIELDS.items():
        group, _, name = former.partition(".")
        if name in config[group]:
            raise ValueError(
                f"`{former}` has been renamed: use `{present}`. "
                f"Received: {former}={config[group][name]}"
            )


def _check_dtype_policy(name):
    try:
        keras.dtype_policies.get(name)
    except ValueError as error:
        raise ValueError(
            "`dtype_policy` must be one of Keras's, such as float32 or "
            f"mixed_bfloat16. Received: dtype_policy={name}"
        ) from error
