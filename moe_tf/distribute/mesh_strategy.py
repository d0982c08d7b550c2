"""The strategy that trains Keras models on a mesh of devices."""

import functools
import warnings
import weakref

import keras
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

    Every other variable is replicated. `docs/mesh.md` shows what is sent,
    lists what is refused, and covers several processes.

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

    >>> strategy = moe_tf.MeshStrategy({"batch": 1}, device_type="CPU")
    >>> with strategy.scope():
    ...     layer = moe_tf.SparseMoE(4, 8, k=2, num_groups=1)
    ...     model = keras.Sequential([keras.Input((6,)), layer])
    ...     model.compile("sgd", "mse", jit_compile=False)
    >>> x = np.ones((8, 6), "float32")
    >>> history = model.fit(x, x, verbose=0)
    >>> [row.layout for row in strategy.summary(model)
    ...  if row.path.endswith("expert_in_kernel")]
    [('batch', None, None)]
    """

    def __init__(
        self, axes, *, layout_map=None, device_type=None, devices=None
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
        self._told = False
        keras_trainer.install()
        rnn_unrolling.install()

    @property
    def num_processes(self):
        """How many processes the mesh spans."""
        return dtensor.num_clients()

    @property
    def process_id(self):
        """Which of the processes this is, from 0."""
        return dtensor.client_id()

    @property
    def is_first(self):
        """Whether this process is the one to print and write for all."""
        return self.process_id == 0

    def reduce(self, reduce_op, value, axis=None):
        """`value`, reduced over `axis`; it is global, so of one replica."""
        if axis is None:
            return value
        mean = "MEAN" in str(reduce_op).upper()
        return (tf.reduce_mean if mean else tf.reduce_sum)(value, axis=axis)

    def constrain(self, tensor, *spec):
        """See `moe_tf.sharding.constrain`."""
        layout_maps.check_divides("a tensor", tensor.shape, spec, self.axes)
        return placement.relayout(tensor, placement.layout(self.mesh, spec))

    def summary(self, model):
        """How the variables of `model` and its optimizer lie on the mesh.

        Args:
            model: built Keras model, made in the scope.

        Returns:
            list of `VariableLayout`, of which `str` gives a line of text.
        """
        return layout_report.variable_layouts(model, self.axes)

    def check(self, model):
        """Makes sure that `model` is laid out as the layout map asks.

        The first step of `fit`, `evaluate`, `predict` or a method for one
        batch calls it.

        Args:
            model: built Keras model.

        Raises:
            ValueError: a variable was not made in the scope, or has another
                layout than was asked for.

        Warns:
            Rules that name no variable, large variables that no rule names,
            and axes that no variable is sharded over.
        """
        layout_report.check_layouts(model, self)

    def check_once(self, model):
        """`check`, if `model` has not been checked."""
        if model not in self._checked:
            self.check(model)
            self._checked.add(model)

    def fetch(self, variable):
        """The whole value of a variable; all processes must ask for it.

        Args:
            variable: `keras.Variable` or `tf.Variable` made in the scope.

        Returns:
            numpy array on the host of each process.
        """
        return _on_mesh(variable).numpy()

    def assign(self, variable, value):
        """Assigns a whole value, of which each device receives its shard.

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

    def own_rows(self, batch):
        """The part of a batch that this process works on.

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
        own = self.input_context.input_pipeline_id
        size = self.axes["batch"]

        def cut(value):
            if not len(value.shape):
                return value
            if value.shape[0] % size:
                raise ValueError(
                    f"A batch must have a multiple of {size} examples to be "
                    f"shared by devices. Received: {value.shape[0]} examples"
                )
            length = value.shape[0] // parts
            return value[own * length : (own + 1) * length]

        return tf.nest.map_structure(cut, batch) if parts > 1 else batch

    def shard_batches(self, dataset):
        """Marks a dataset that all processes read alike, batch by batch.

        Its batches are whole ones, and each process takes its rows of them:
        that gives exactly the batches of one process, those that the axis
        `batch` does not divide included, but all read everything. Checksums
        make sure that the batches are equal.

        Args:
            dataset: `tf.data.Dataset` of batches.

        Returns:
            `tf.data.Dataset` for `fit`, `evaluate` or `predict`.
        """
        return datasets.shard_batches(dataset)

    def put_batch(self, batch, whole=False):
        """`batch` on the mesh, its examples sharded over `batch`.

        Args:
            batch: nest of tensors or arrays whose first dimension counts
                examples; scalars are replicated. With several processes, the
                part of this one.
            whole: bool, whether it is the whole batch in every process.

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
        if value.shape.rank and not self._told:
            self._tell_if_whole(placed)
        return placed

    def _tell_if_whole(self, batch):
        size = self.axes["batch"]
        if size == 1 or not dtensor.fetch_layout(batch).is_fully_replicated():
            return
        self._told = True
        warnings.warn(
            f"A batch of {batch.shape[0]} examples cannot be shared by the "
            f"{size} devices along `batch`, so each computes it whole, in the "
            "memory of all. Batch with `drop_remainder=True`, or with a "
            f"multiple of {size} examples, to avoid that.",
            stacklevel=2,
        )


def _on_mesh(variable):
    """The `MeshVariable` of a Keras variable, or itself."""
    return variable.value if isinstance(variable, keras.Variable) else variable
