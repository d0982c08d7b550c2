"""Implementation of `tf.distribute`'s strategy interface on a DTensor mesh."""

import contextlib
import weakref
from collections.abc import Callable
from collections.abc import Iterator

import keras
import tensorflow as tf
from tensorflow.experimental import dtensor
from tensorflow.python.distribute.experimental import dtensor_strategy_extended
from tensorflow.python.distribute.experimental import dtensor_util

from moe_tf.distribute import all_reduces
from moe_tf.distribute import datasets
from moe_tf.distribute import layout_map as layout_maps
from moe_tf.distribute import mesh_variables
from moe_tf.distribute import placement
from moe_tf.distribute import randomness
from moe_tf.types import Nest

# Optimizers that only add sparse gradients to dense values.
_ADDING = (keras.optimizers.SGD, keras.optimizers.Adam)


class ReplicaContext(dtensor_util.DTensorReplicaContext):
    """The only replica; gradients of global tensors are reduced already."""

    def all_reduce(
        self,
        reduce_op: tf.distribute.ReduceOp,
        value: Nest,
        options: object = None,
    ) -> Nest:
        return tf.nest.map_structure(
            self._sparse, value, expand_composites=False
        )

    def _sparse(self, gradient):
        """Replicates a sparse gradient where the optimizer needs all rows.

        Most optimizers do more with sparse gradients than add them to dense
        values. Where they divide by dense values, Keras keeps the rows that
        become NaN and finds these by `tf.where`, which DTensor cannot lay
        out. So every device gets all rows. Indices are int32, since DTensor
        gives Keras's scatters a shape in int32 whatever the indices' dtype.
        """
        if not isinstance(gradient, tf.IndexedSlices):
            return gradient
        values, indices = gradient.values, gradient.indices
        if not all(
            isinstance(o, _ADDING) for o in mesh_variables.active_optimizers()
        ):
            values, indices = (
                self.strategy.constrain(part, *(None,) * part.shape.rank)
                for part in (values, tf.cast(indices, "int32"))
            )
        return tf.IndexedSlices(values, indices, gradient.dense_shape)

    def _update(self, var, fn, args=(), kwargs=None, group=True):
        return fn(var, *args, **(kwargs or {}))


class MeshExtended(dtensor_strategy_extended.DTensorStrategyExtended):
    """Runs functions once, on global tensors, and lays variables out.

    TensorFlow's own class supports only one-dimensional meshes and replicated
    variables.

    Args:
        strategy: `MeshStrategy`
        mesh: `dtensor.Mesh`
        axes: dict from axis to size.
        layout_map: the user's `LayoutMap`; its rules precede the default's.
    """

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        mesh: dtensor.Mesh,
        axes: dict[str, int],
        layout_map: layout_maps.LayoutMap,
    ):
        super().__init__(strategy, mesh)
        self._axes = axes
        self._layout_maps = (layout_map, layout_maps.default_layout_map(axes))
        self._reference = None
        self._weights = []

    def _create_variable(self, next_creator, **kwargs):
        all_reduces.configure_environment()
        initial_value, name = kwargs["initial_value"], kwargs.get("name")
        path = mesh_variables.find_path(name, initial_value)
        options = ("trainable", "aggregation", "synchronization")
        options = {key: kwargs[key] for key in options if key in kwargs}
        with tf.init_scope():
            with placement.host():
                value = tf.convert_to_tensor(
                    initial_value()
                    if callable(initial_value)
                    else initial_value,
                    dtype=kwargs.get("dtype"),
                )
            rule, spec = self._find_spec(path, tuple(value.shape))
            layout = placement.layout(self._mesh, spec)
            if dtensor.is_dtensor(value):
                value = placement.relayout(value, layout)
            else:
                value = placement.put(value, layout)
            variable = mesh_variables.MeshVariable(
                value,
                name=name,
                distribute_strategy=self._container_strategy(),
                **options,
            )
        variable.path, variable.spec, variable.rule = path, spec, rule
        if not mesh_variables.active_optimizers():
            self._weights.append(weakref.ref(variable))
        return variable

    def _find_spec(self, path, shape):
        """Returns `(rule, spec)` of a new variable."""
        if mesh_variables.active_optimizers():
            weights = [ref() for ref in self._weights]
            spec = mesh_variables.slot_spec(
                path.rpartition("/")[2],
                shape,
                self._reference,
                [weight for weight in weights if weight is not None],
            )
            return None, spec
        for layout_map in self._layout_maps:
            matched = layout_map.match(path)
            if matched is not None:
                layout_maps.check_divides(path, shape, matched[1], self._axes)
                return matched
        return None, (None,) * len(shape)

    @contextlib.contextmanager
    def colocate_vars_with(
        self, colocate_with_variable: tf.Variable
    ) -> Iterator[None]:
        # Keras's optimizers call this with the weight of a new slot.
        outer = self._reference
        self._reference = colocate_with_variable
        try:
            yield
        finally:
            self._reference = outer

    @property
    def _num_replicas_in_sync(self):
        return 1

    def _default_device_scope(self):
        return None  # Eager code in the scope runs on the host as usual.

    def call_for_each_replica(
        self,
        fn: Callable[..., Nest],
        args: tuple = (),
        kwargs: dict | None = None,
    ) -> Nest:
        all_reduces.configure_environment()
        strategy = self._container_strategy()
        with strategy.scope(), ReplicaContext(strategy):
            if tf.executing_eagerly():
                args, kwargs = strategy.put_batch((args, kwargs or {}))
                with dtensor.default_mesh(self._mesh):
                    return fn(*args, **kwargs)
            with randomness.replicated_draws(self._mesh):
                return fn(*args, **(kwargs or {}))

    def _update(self, var, fn, args, kwargs, group):
        return fn(var, *args, **(kwargs or {}))

    def _replica_ctx_update(self, var, fn, args, kwargs, group):
        return fn(var, *args, **(kwargs or {}))

    def _replica_ctx_all_reduce(self, reduce_op, value, options=None):
        return value

    def _experimental_distribute_dataset(self, dataset, options):
        return datasets.MeshDataset(dataset, self._container_strategy())

    def _distribute_datasets_from_function(self, dataset_fn, options):
        context = self._container_strategy().input_context
        return self._experimental_distribute_dataset(
            dataset_fn(context), options
        )
