"""The mean of the weights of several checkpoints."""

import numpy as np
import tensorflow as tf

from moe_tf.distribute import MeshStrategy
from moe_tf.training import checkpoints


def average_checkpoints(
    source: checkpoints.Checkpoints,
    target: checkpoints.Checkpoints,
    variables: dict[str, tf.Variable],
    strategy: MeshStrategy | None = None,
) -> list[int]:
    """Saves the mean of the weights of all checkpoints in `source`.

    Means of the model's floating-point variables are computed in float64. All
    other variables, such as seeds and the optimizer's, are those of the
    latest checkpoint. The model holds the mean afterwards.

    Args:
        source: the checkpoints; a damaged one is an error.
        target: the folder where the mean is saved, as of the latest step.
        variables: the variables of both, by name; see
            `variables.named_variables`.
        strategy: optional `MeshStrategy` of the variables.

    Returns:
        The steps that went into the mean, ascending.

    Raises:
        ValueError: there is no checkpoint.
        DamagedCheckpointError: a checkpoint is damaged.
    """
    steps = source.steps()
    if not steps:
        raise ValueError(
            f"There is no checkpoint to average in {source.directory}; a run "
            "saves the first at its first evaluation."
        )
    averaged = {
        name: variable
        for name, variable in variables.items()
        if name.startswith("model/") and variable.dtype.is_floating
    }
    sums = {
        name: np.zeros(variable.shape, "float64")
        for name, variable in averaged.items()
    }
    for step in steps:  # ascending: the latest stays
        source.restore_step(step)
        for name, variable in averaged.items():
            sums[name] += _fetch(variable, strategy)
    for name, variable in averaged.items():
        mean = (sums[name] / len(steps)).astype(variable.dtype.as_numpy_dtype)
        if strategy is None:
            variable.assign(mean)
        else:
            strategy.assign(variable, mean)
    target.save(steps[-1], {"averaged_steps": steps})
    return steps


def _fetch(variable, strategy):
    return variable.numpy() if strategy is None else strategy.fetch(variable)
