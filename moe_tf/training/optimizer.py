"""Optimizers that a config can name.

A new optimizer is one line of `OPTIMIZERS`: its class, and the size of its
state, which a dry run reports before any variable exists.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import keras
import ml_collections

from moe_tf import optimizers


class _Optimizer(NamedTuple):
    """An optimizer's class and the size of its state.

    Attributes:
        make: function of a learning rate and keyword arguments.
        state_size: function of a kernel's shape to the number of values that
            the optimizer keeps for this kernel.
    """

    make: Callable[..., keras.optimizers.Optimizer]
    state_size: Callable[[tuple[int, ...]], int]


def _adam_state_size(shape: tuple[int, ...]) -> int:
    return 2 * math.prod(shape)


def _factored_adam_state_size(shape: tuple[int, ...]) -> int:
    """The means along rows and columns of each matrix."""
    return math.prod(shape[:-2]) * sum(shape[-2:])


OPTIMIZERS = {
    "adam": _Optimizer(keras.optimizers.Adam, _adam_state_size),
    "factored_adam": _Optimizer(
        optimizers.FactoredAdam, _factored_adam_state_size
    ),
}


def make_optimizer(
    train: ml_collections.ConfigDict,
    schedule: keras.optimizers.schedules.LearningRateSchedule,
    **settings,
) -> keras.optimizers.Optimizer:
    """Makes the optimizer of a run.

    Args:
        train: `config.train`, whose `optimizer` is a name of `OPTIMIZERS` and
            whose `clip_norm` is the largest norm of the whole gradient.
        schedule: the learning rate.
        **settings: further arguments of the optimizer's class.
    """
    return OPTIMIZERS[train.optimizer].make(
        schedule, global_clipnorm=train.clip_norm, **settings
    )


def state_size(name: str, shape: tuple[int, ...]) -> int:
    """Returns the number of values that an optimizer keeps for a kernel.

    Args:
        name: one of `OPTIMIZERS`.
        shape: the kernel's shape on one device.
    """
    return OPTIMIZERS[name].state_size(shape)
