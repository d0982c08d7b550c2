"""Layouts of a model's variables on a mesh: a summary and a check."""

import math
import typing
import warnings

import keras
import tensorflow as tf
from tensorflow.experimental import dtensor

from moe_tf.distribute import mesh_variables

LARGE = 64 * 2**20  # Bytes above which a replicated variable is reported.


class VariableLayout(typing.NamedTuple):
    """A variable's shape, dtype, layout and size on a mesh.

    Attributes:
        path: str, Keras's path of the variable.
        shape: tuple of ints, of the global variable.
        dtype: str
        layout: tuple of axis names and None.
        bytes_per_device: int
    """

    path: str
    shape: tuple
    dtype: str
    layout: tuple
    bytes_per_device: int

    def __str__(self):
        layout = ", ".join(axis or "-" for axis in self.layout)
        size = self.bytes_per_device / 2**20
        return (
            f"{self.path}  {self.shape}  {self.dtype}  ({layout})  "
            f"{size:.3f} MiB per device"
        )


def variable_layouts(
    model: keras.Model, axes: dict[str, int]
) -> list[VariableLayout]:
    """Lists the layouts of the variables of a model and its optimizer."""
    return [_row(variable, axes) for variable in _variables(model)]


def check_layouts(model: keras.Model, strategy: tf.distribute.Strategy) -> None:
    """Implements `MeshStrategy.check`."""
    axes, used = strategy.axes, {"batch"}
    large = []
    for variable in _variables(model):
        actual = _layout(variable.read_value())
        if actual != tuple(variable.spec):
            raise ValueError(
                f"The variable {variable.path} must be laid out as "
                f"{variable.spec}, and variables keep the layout that they are "
                "made with. Make the model anew inside "
                "`with strategy.scope():`; `strategy.fetch` and "
                "`strategy.assign` carry values over. "
                f"Received: {actual}"
            )
        used.update(variable.spec)
        row = _row(variable, axes)
        if (
            variable.trainable
            and variable.rule is None
            and row.bytes_per_device > LARGE
        ):
            large.append(str(row))
    unmatched = strategy.layout_map.unmatched(
        [variable.path for variable in model.variables]
    )
    if unmatched:
        warnings.warn(
            "No variable of the model has a path that matches these keys of "
            f"the `layout_map`: {unmatched}; `strategy.summary` lists the "
            "paths",
            stacklevel=2,
        )
    if large and strategy.mesh.size > 1:
        warnings.warn(
            "These variables are replicated on every device; a `layout_map` "
            "can shard them:\n" + "\n".join(large),
            stacklevel=2,
        )
    idle = [name for name in axes if name not in used and axes[name] > 1]
    if idle:
        warnings.warn(
            f"No variable is sharded over {idle}: all devices along such an "
            f"axis do the same work. Received: axes={axes}",
            stacklevel=2,
        )


def _variables(model):
    """Lists the `MeshVariable`s of a model and its optimizer, each once."""
    optimizer = getattr(model, "optimizer", None)
    by_id = {}
    for variable in [*model.variables, *getattr(optimizer, "variables", ())]:
        value = variable.value
        if not isinstance(value, mesh_variables.MeshVariable):
            raise ValueError(
                f"The variable {variable.path} was made outside of the "
                "strategy's scope. Make and compile the model inside "
                "`with strategy.scope():`."
            )
        by_id[id(value)] = value
    return list(by_id.values())


def _layout(tensor):
    """Returns a DTensor's layout as a tuple of axis names and None."""
    specs = dtensor.fetch_layout(tensor).sharding_specs
    return tuple(None if axis == dtensor.UNSHARDED else axis for axis in specs)


def _row(variable, axes):
    size = math.prod(variable.shape) * variable.dtype.size
    shards = math.prod(axes[axis] for axis in variable.spec if axis)
    return VariableLayout(
        variable.path,
        tuple(variable.shape),
        variable.dtype.name,
        variable.spec,
        size // shards,
    )
