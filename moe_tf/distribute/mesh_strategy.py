"""Strategy that trains Keras models on a mesh of devices."""

import functools
import warnings
import weakref
from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf
from tensorflow.experimental import dtensor

from moe_tf.distribute import all_reduces
from moe_tf.distribute import datasets
from moe_tf.distribute import extended
from moe_tf.distribute import keras_trainer
from moe_tf.distribute import layout_map as layout_maps
from moe_tf.distribute import layout_report
from moe_tf.distribute import mesh as meshes
from moe_tf.distribute import placement
from moe_tf.distribute import process_sync
from moe_tf.distribute import rnn_unrolling
from moe_tf.distribute.layout_map import LayoutMap
from moe_tf.types import Nest
from moe_tf.types import Tensor


class MeshStrategy(tf.distribute.Strategy):
    """Trains a Keras model on a mesh of devices, experts sharded over it.

    Gives the losses, weights and metrics of one device, up to rounding: all
    tensors are global, and there is one replica. On four devices with 8
    experts:

        MeshStrategy({"batch": 4})           {"batch": 2, "expert": 2}

        device   examples   experts          device   examples   experts
           0     1st 1/4    0 1                 0     1st half   0 1 2 3
           1     2nd 1/4    2 3                 1     1st half   4 5 6 7
           2     3rd 1/4    4 5                 2     2nd half   0 1 2 3
           3     4th 1/4    6 7                 3     2nd half   4 5 6 7

    Every other variable is replicated. Random draws, dropout's too, and the
    order of the data are those of one device. A batch that the axis `batch`
    does not divide is computed whole by every device, which is exact but
    saves nothing; a warning reports it. Keras's recurrent layers are unrolled.

    With several processes (`distribute.resolve_cluster`) all run one program,
    and the mesh has the devices of all, in the order of the processes. Each
    process reads its own part of every batch (`input_context`, `own_rows`),
    or all read whole batches (`shard_batches`, or arrays given to `fit`). All
    must make the same calls with equally many batches; otherwise, or when a
    process is lost, they raise `RuntimeError`. `docs/mesh.md` has details.

    Args:
        axes: dict from axis name to size, in the order of the devices, the
            last axis fastest. `batch` shards the examples. Experts are sharded
            over `expert` if there is such an axis, else over `batch` (the
            paper's section 3.1). Devices that differ along `expert` alone
            repeat the work of all other layers. `model` is free for layouts
            of your own.
        layout_map: `LayoutMap`, or a dict for one, with layouts of variables
            by path. Its keys come before the default, which shards the
            experts of every `SparseMoE`. An optimizer's variables have the
            layout of their weight.
        device_type: `"CPU"`, `"GPU"` or `"TPU"`. Defaults to the accelerators
            of the machine, or to virtual devices of the CPU without any.
        devices: names such as `"GPU:1"`, one for each place of the mesh.
            Defaults to the first ones.

    Raises:
        ValueError: an argument is not as above, or there are too few devices.
        RuntimeError: another strategy is in use, TensorFlow has started with
            too few devices, DTensor would merge all-reduces (see
            `all_reduces`), or processes have different axes or layouts.

    Example:

    >>> strategy = moe_tf.MeshStrategy({"batch": 4})
    >>> with strategy.scope():
    ...     layer = moe_tf.SparseMoE(8, 12, k=2, num_groups=4)
    ...     model = keras.Sequential([keras.Input((6,)), layer])
    ...     model.compile("sgd", "mse", jit_compile=False)
    >>> x = np.ones((8, 6), "float32")
    >>> history = model.fit(x, x, verbose=0)
    >>> for row in strategy.summary(model):
    ...     if "expert_in_kernel" in row.path:
    ...         print(row.shape, row.layout)
    (8, 6, 12) ('batch', None, None)
    """

    def __init__(
        self,
        axes: dict[str, int],
        *,
        layout_map: LayoutMap | dict | None = None,
        device_type: str | None = None,
        devices: Sequence[str] | None = None,
    ):
        self.axes = meshes.check_axes(axes)
        layout_map = layout_maps.LayoutMap(layout_map)
        layout_map.check_axes(self.axes)
        self.layout_map = layout_map
        self.mesh = meshes.create_mesh(self.axes, device_type, devices)
        process_sync.agree("a mesh", 0, f"axes={self.axes}, {dict(layout_map)}")
        self.input_context = tf.distribute.InputContext(
            *placement.own_part(self.axes, self.num_processes, self.process_id)
        )
        all_reduces.check_not_merged(self.mesh)
        super().__init__(
            extended.MeshExtended(self, self.mesh, self.axes, layout_map)
        )
        self._checked = weakref.WeakSet()
        self._warned = False
        keras_trainer.install()
        rnn_unrolling.install()

    @property
    def num_processes(self) -> int:
        """Number of processes that the mesh spans."""
        return dtensor.num_clients()

    @property
    def process_id(self) -> int:
        """Index of this process, from 0."""
        return dtensor.client_id()

    @property
    def is_first(self) -> bool:
        """Whether this is process 0, which prints and writes for all."""
        return self.process_id == 0

    def reduce(
        self,
        reduce_op: tf.distribute.ReduceOp | str,
        value: Tensor,
        axis: int | None = None,
    ) -> tf.Tensor:
        """Reduces a global tensor over `axis`; there is one replica only."""
        if axis is None:
            return value
        mean = "MEAN" in str(reduce_op).upper()
        return (tf.reduce_mean if mean else tf.reduce_sum)(value, axis=axis)

    def constrain(self, tensor: tf.Tensor, *spec: str | None) -> tf.Tensor:
        """Gives a DTensor a layout. See `moe_tf.sharding.constrain`."""
        layout_maps.check_divides("a tensor", tensor.shape, spec, self.axes)
        return placement.relayout(tensor, placement.layout(self.mesh, spec))

    def summary(self, model: keras.Model) -> list[layout_report.VariableLayout]:
        """Lists the layouts of the variables of a model and its optimizer.

        Args:
            model: built Keras model, made in the scope.

        Returns:
            list of `VariableLayout`, of which `str` gives a line of text.
        """
        return layout_report.variable_layouts(model, self.axes)

    def check(self, model: keras.Model) -> None:
        """Checks that the layouts of a model's variables follow the rules.

        The first step of `fit`, `evaluate`, `predict` or a method for one
        batch calls it.

        Args:
            model: built Keras model.

        Raises:
            ValueError: a variable was not made in the scope, or has another
                layout than the layout map gives.

        Warns:
            For rules that match no variable, for large variables that no rule
            matches, and for axes that no variable is sharded over.
        """
        layout_report.check_layouts(model, self)

    def check_once(self, model: keras.Model) -> None:
        """Calls `check` unless the model has been checked."""
        if model not in self._checked:
            self.check(model)
            self._checked.add(model)

    def fetch(self, variable: keras.Variable | tf.Variable) -> np.ndarray:
        """Fetches the whole value of a variable to the host.

        All processes must call it together.

        Args:
            variable: `keras.Variable` or `tf.Variable` made in the scope.

        Returns:
            numpy array on the host of each process.
        """
        return _on_mesh(variable).numpy()

    def assign(
        self, variable: keras.Variable | tf.Variable, value: Tensor
    ) -> None:
        """Assigns a whole value; each device receives its shard of it.

        Args:
            variable: as for `fetch`.
            value: array or tensor on the host, equal in all processes.

        Raises:
            ValueError: `value` has another shape than the variable.
        """
        if tuple(value.shape) != tuple(variable.shape):
            raise ValueError(
                f"`value` must have the shape of {variable.path}, "
                f"{tuple(variable.shape)}. Received: {tuple(value.shape)}"
            )
        _on_mesh(variable).assign(value)

    def own_rows(self, batch: Nest) -> Nest:
        """Returns the part of a batch that this process works on.

        Args:
            batch: nest of arrays or tensors whose first dimension counts
                examples; scalars stay as they are.

        Returns:
            The same nest; with one process `batch` itself.

        Raises:
            ValueError: the size of the axis `batch` does not divide the
                number of examples.
        """
        parts = self.input_context.num_input_pipelines
        part = self.input_context.input_pipeline_id
        size = self.axes["batch"]

        def slice_rows(value):
            if not len(value.shape):
                return value
            if value.shape[0] % size:
                raise ValueError(
                    f"A batch must have a multiple of {size} examples to be "
                    f"sharded. Received: {value.shape[0]} examples"
                )
            length = value.shape[0] // parts
            return value[part * length : (part + 1) * length]

        if parts == 1:
            return batch
        return tf.nest.map_structure(slice_rows, batch)

    def shard_batches(self, dataset: tf.data.Dataset) -> tf.data.Dataset:
        """Marks a dataset whose batches every process reads whole.

        Each process takes its own examples of each batch. Batches are then
        exactly those of one process, also where the axis `batch` does not
        divide them, but every process reads all data. Checksums verify that
        the processes read equal batches.

        Args:
            dataset: `tf.data.Dataset` of batches.

        Returns:
            `tf.data.Dataset` for `fit`, `evaluate` or `predict`.
        """
        return datasets.shard_batches(dataset)

    def put_batch(self, batch: Nest, whole: bool = False) -> Nest:
        """Places a batch on the mesh, its examples sharded over `batch`.

        Args:
            batch: nest of tensors or arrays whose first dimension counts
                examples; scalars are replicated. With several processes, the
                part of this process, unless `whole`.
            whole: bool, whether every process gives the whole batch.
                Defaults to `False`.

        Returns:
            The same nest of DTensors.

        Raises:
            ValueError: a tensor is ragged or sparse.
        """
        put = functools.partial(self._put_one, whole=whole)
        return tf.nest.map_structure(put, batch)

    def _put_one(self, value, whole):
        if value is None or isinstance(value, tf.experimental.Optional):
            return value
        if isinstance(value, tf.RaggedTensor | tf.SparseTensor):
            raise ValueError(
                "Batches on a mesh must be dense. Use `to_tensor` or "
                f"`tf.sparse.to_dense`. Received: {type(value).__name__}"
            )
        with placement.host():
            value = tf.convert_to_tensor(value)
        if dtensor.is_dtensor(value):
            return value
        placed = placement.put_batch(value, self.mesh, whole)
        if value.shape.rank and not self._warned:
            self._warn_if_replicated(placed)
        return placed

    def _warn_if_replicated(self, batch):
        size = self.axes["batch"]
        if size == 1 or not dtensor.fetch_layout(batch).is_fully_replicated():
            return
        self._warned = True
        warnings.warn(
            f"A batch of {batch.shape[0]} examples cannot be sharded over the "
            f"{size} devices along `batch`, so every device computes the whole "
            "batch. Batch with `drop_remainder=True`, or with a "
            f"multiple of {size} examples, to avoid that.",
            stacklevel=2,
        )


def _on_mesh(variable):
    """Returns the `MeshVariable` of a Keras variable, or the argument."""
    return variable.value if isinstance(variable, keras.Variable) else variable
