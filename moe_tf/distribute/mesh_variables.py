"""Variables on a mesh."""

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend.common import global_state
from keras.src.backend.common.name_scope import current_path
from tensorflow.experimental import dtensor

from moe_tf import sharding
from moe_tf.distribute import placement
from moe_tf.distribute import process_sync


class MeshVariable(dtensor.DVariable):
    """A variable whose shards lie on the devices of a mesh.

    It can be read and assigned as any other: `numpy()` gives all of it, put
    together on the host, and a value of this process that is assigned is cut
    on the host. No device holds a sharded variable whole. It keeps its layout
    whatever is assigned. Where there are several processes all must read a
    sharded variable, and assign equal values.

    Sparse updates (`tf.IndexedSlices`, the gradients of embeddings) become
    dense ones: DTensor cannot lay scatters out. That happens here, where
    optimizers write, because on their way they treat sparse gradients in
    another way than dense ones (Adam squares before it sums), and should do
    so as on one device.

    Attributes:
        path: str, Keras's path of the variable.
        spec: tuple of axis names and None, the layout.
        rule: key of the layout map that gave it, or None.
    """

    path = spec = rule = None  # TensorFlow lets no arguments be added.

    def numpy(self):
        if any(self.spec):
            process_sync.agree("reading a sharded variable", 0, self.path)
        return placement.get(self.read_value())

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.numpy(), dtype=dtype)

    def assign(self, value, *args, **kwargs):
        return super().assign(self._laid_out(value), *args, **kwargs)

    def assign_add(self, delta, *args, **kwargs):
        return super().assign_add(self._laid_out(delta), *args, **kwargs)

    def assign_sub(self, delta, *args, **kwargs):
        return super().assign_sub(self._laid_out(delta), *args, **kwargs)

    def scatter_add(self, sparse_delta, use_locking=False, name=None):
        return self.assign_add(self._dense(sparse_delta))

    def scatter_sub(self, sparse_delta, use_locking=False, name=None):
        return self.assign_sub(self._dense(sparse_delta))

    def scatter_update(self, sparse_delta, use_locking=False, name=None):
        raise NotImplementedError(
            f"Rows of the variable {self.path} cannot be replaced on a mesh: "
            "DTensor cannot lay scatters out. Assign the whole value."
        )

    def _dense(self, rows):
        # Of the variable's own length: DTensor cannot cut what `rows` says
        # of it, a tensor, into shards.
        return tf.math.unsorted_segment_sum(
            rows.values, rows.indices, self.shape[0]
        )

    def _laid_out(self, value):
        if not tf.executing_eagerly():
            value = tf.convert_to_tensor(value, dtype=self.dtype)
            if sharding.axes() is None:  # Traced to be exported.
                return value
            return placement.relayout(value, self.layout)
        with placement.host():
            value = tf.convert_to_tensor(value, dtype=self.dtype)
        if dtensor.is_dtensor(value):
            return placement.relayout(value, self.layout)
        with placement.host():
            value = tf.broadcast_to(value, self.shape)
        return placement.put(value, self.layout)


def find_path(name, initial_value):
    """Keras's path of a variable that is being created.

    Variables of layers that are built inside another layer's `call` are
    created later, outside their scopes. Keras then hands over a function
    that holds its own variable, which knows its path.
    """
    for cell in getattr(initial_value, "__closure__", None) or ():
        if isinstance(cell.cell_contents, keras.Variable):
            return cell.cell_contents.path
    return "/".join(part for part in (current_path(), name) if part)


def active_optimizers():
    """The Keras optimizers at work, outermost first."""
    scopes = global_state.get_global_attribute("name_scope_stack") or ()
    kind = keras.optimizers.Optimizer
    return [s.caller for s in scopes if isinstance(s.caller, kind)]


def slot_spec(name, shape, reference, weights):
    """The layout of an optimizer's variable: that of its weight.

    Args:
        name: str, without its scope. Keras puts the weight's path or name
            into it.
        shape: tuple of ints: the weight's, or that without its last or
            last but one dimension (means along rows or columns).
        reference: the weight, where Keras says it, or None.
        weights: list of `MeshVariable`, where to look for it otherwise.

    Returns:
        tuple of axis names and None; replicated if weights that could be
        meant disagree.
    """
    if reference is None:
        weights = _named(name, weights)
    else:
        weights = [reference]
    specs = {spec for weight in weights for spec in _fitting(weight, shape)}
    return specs.pop() if len(specs) == 1 else (None,) * len(shape)


def _named(name, weights):
    """The weights that `name` may speak of."""
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
    whole, spec = tuple(weight.shape), weight.spec
    if shape == whole:
        yield spec
    if len(whole) >= 2 and shape == whole[:-1]:
        yield spec[:-1]
    if len(whole) >= 2 and shape == whole[:-2] + whole[-1:]:
        yield spec[:-2] + spec[-1:]
