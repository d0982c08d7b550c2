"""Variables on a mesh, and the layouts of optimizers' variables."""

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend.common import global_state
from keras.src.backend.common.name_scope import current_path
from tensorflow.experimental import dtensor

from moe_tf import sharding
from moe_tf.distribute import placement
from moe_tf.distribute import process_sync
from moe_tf.types import Tensor


class MeshVariable(dtensor.DVariable):
    """Variable whose shards lie on the devices of a mesh.

    Reads and assigns like any other variable. `numpy()` assembles the value on
    the host, and an assigned value is split on the host, so no device ever
    holds a sharded variable whole. Assignments keep the layout. With several
    processes, all must read a sharded variable together, and assign equal
    values.

    Sparse updates (`tf.IndexedSlices`, the gradients of embeddings) become
    dense here, since DTensor cannot lay scatters out. They must stay sparse
    up to this point: optimizers treat sparse gradients differently (Adam
    squares rows before it adds duplicates), and a mesh should give what one
    device gives.

    Attributes:
        path: str, Keras's path of the variable.
        spec: tuple of axis names and None, the layout.
        rule: key of the layout map that gave the layout, or None.
    """

    path = spec = rule = None  # TensorFlow allows no further arguments.

    def numpy(self) -> np.ndarray:
        if any(self.spec):
            process_sync.agree("reading a sharded variable", 0, self.path)
        return placement.get(self.read_value())

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.numpy(), dtype=dtype)

    def assign(self, value: Tensor, *args, **kwargs) -> object:
        return super().assign(self._laid_out(value), *args, **kwargs)

    def assign_add(self, delta: Tensor, *args, **kwargs) -> object:
        return super().assign_add(self._laid_out(delta), *args, **kwargs)

    def assign_sub(self, delta: Tensor, *args, **kwargs) -> object:
        return super().assign_sub(self._laid_out(delta), *args, **kwargs)

    def scatter_add(
        self,
        sparse_delta: tf.IndexedSlices,
        use_locking: bool = False,
        name: str | None = None,
    ) -> object:
        return self.assign_add(self._dense(sparse_delta))

    def scatter_sub(
        self,
        sparse_delta: tf.IndexedSlices,
        use_locking: bool = False,
        name: str | None = None,
    ) -> object:
        return self.assign_sub(self._dense(sparse_delta))

    def scatter_update(
        self,
        sparse_delta: tf.IndexedSlices,
        use_locking: bool = False,
        name: str | None = None,
    ) -> object:
        raise NotImplementedError(
            f"Rows of the variable {self.path} cannot be replaced on a mesh: "
            "DTensor cannot lay scatters out. Assign the whole value."
        )

    def _dense(self, rows):
        # The length comes from the variable: `rows.dense_shape` is a tensor,
        # from which DTensor could not tell the sizes of shards.
        return tf.math.unsorted_segment_sum(
            rows.values, rows.indices, self.shape[0]
        )

    def _laid_out(self, value):
        if not tf.executing_eagerly():
            value = tf.convert_to_tensor(value, dtype=self.dtype)
            if sharding.axes() is None:  # Traced for an export.
                return value
            return placement.relayout(value, self.layout)
        with placement.host():
            value = tf.convert_to_tensor(value, dtype=self.dtype)
        if dtensor.is_dtensor(value):
            return placement.relayout(value, self.layout)
        with placement.host():
            value = tf.broadcast_to(value, self.shape)
        return placement.put(value, self.layout)


def find_path(name: str, initial_value: object) -> str:
    """Returns Keras's path of a variable that is being created.

    A layer that is built inside another layer's `call` creates its variables
    later, outside its name scope. `initial_value` is then a function whose
    closure holds the Keras variable, which has the path.
    """
    for cell in getattr(initial_value, "__closure__", None) or ():
        if isinstance(cell.cell_contents, keras.Variable):
            return cell.cell_contents.path
    return "/".join(part for part in (current_path(), name) if part)


def active_optimizers() -> list[keras.optimizers.Optimizer]:
    """Lists the Keras optimizers with open name scopes, outermost first."""
    scopes = global_state.get_global_attribute("name_scope_stack") or ()
    kind = keras.optimizers.Optimizer
    return [s.caller for s in scopes if isinstance(s.caller, kind)]


def slot_spec(
    name: str,
    shape: tuple[int, ...],
    reference: MeshVariable | None,
    weights: list[MeshVariable],
) -> tuple[str | None, ...]:
    """Returns the layout of an optimizer's variable, taken from its weight.

    Args:
        name: str, the variable's name without its scope. Keras makes it of
            the weight's path or name.
        shape: tuple of ints: the weight's shape, or the weight's shape
            without its last or last but one dimension (means along rows or
            columns).
        reference: the weight, where Keras gives it, or None.
        weights: list of `MeshVariable` to search otherwise.

    Returns:
        tuple of axis names and None. All None (replicated) if several weights
        match and disagree.
    """
    if reference is None:
        weights = _named(name, weights)
    else:
        weights = [reference]
    specs = {spec for weight in weights for spec in _fitting(weight, shape)}
    return specs.pop() if len(specs) == 1 else (None,) * len(shape)


def _named(name, weights):
    """Lists the weights that `name` may be made of."""
    flat = {weight.path.replace("/", "_") for weight in weights}
    longest = max(
        (path for path in flat if name.startswith(path + "_")),
        key=len,
        default=None,
    )
    if longest is not None:  # `<path>_velocity_row`
        return [w for w in weights if w.path.replace("/", "_") == longest]
    return [w for w in weights if w.path.rpartition("/")[2] == name]


def _fitting(weight, shape):
    full, spec = tuple(weight.shape), weight.spec
    if shape == full:
        yield spec
    if len(full) >= 2 and shape == full[:-1]:
        yield spec[:-1]
    if len(full) >= 2 and shape == full[:-2] + full[-1:]:
        yield spec[:-2] + spec[-1:]
