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
from moe_tf.distribute import mesh as meshes
from moe_tf.distribute import peers
from moe_tf.distribute import placement
from moe_tf.distribute import recurrence
from moe_tf.distribute import report


class MeshStrategy(tf.distribute.Strategy):
    """Trains a Keras model on many devices, experts spread over them.

    ```python
    strategy = moe_tf.MeshStrategy({"batch": 8})
    with strategy.scope():
        model = ...
        model.compile(...)
    model.fit(data)
    ```

    Training gives what one device gives, to rounding. Tensors are global:
    losses, `add_loss`, metrics and gradients are over the whole batch, and
    there is one replica.

    Args:
        axes: dict from name to size, in the order of the devices. `batch`
            carries the examples. Experts are sharded over `expert` if it is
            there, else over `batch` (the paper's scheme: each device has its
            part of the examples and of the experts). With `expert`, all
            devices along it repeat the work of every other layer. `model` is
            for layouts of your own.
        layout_map: `LayoutMap`, or a dict for one: layouts of variables by
            path, before the default, which shards the experts of every
            `SparseMoE`. Other variables are replicated. Variables of the
            optimizer have the layout of their weight.
        device_type: `"CPU"`, `"GPU"` or `"TPU"`. Defaults to the accelerators
            of the machine, or CPUs without any. CPUs are virtual devices.
        devices: names such as `"GPU:1"`, one for each place of the mesh.
            Defaults to the first ones.

    A sharded variable is initialised on the host, one variable at a time, with
    the values that one device would get, and each device receives its shard:
    none ever holds the whole.

    Random numbers, dropout's too, are those of one device: each device draws
    the whole tensor and keeps its shard. So is the order of the data: building
    the model takes no batch from it, as it does in other strategies.

    `fit` and `evaluate` draw and place the next batch while devices work on
    one, before that one's callbacks: a batch more than they use may be drawn.

    A batch that the axis `batch` does not divide (the last, without
    `drop_remainder`) is computed whole by every device. That is exact for
    losses, metrics and predictions, which padding is not, and takes as much
    memory as on one device; a warning says so.

    Keras's recurrent layers are unrolled, whatever their `unroll` says: a
    program of 69 steps takes 15 s to make.

    **Several processes.** Started by `moe-tf-launch`, with `TF_CONFIG` or by
    SLURM (`cluster.resolve`), or after `cluster.start`, all run one program,
    and the mesh has the devices of all, in the order of the processes. Each
    reads its own part of every batch, in the same order; `input_context`
    says which. Data that all read whole, and equal, are marked by
    `shard_batches`; arrays given to `fit`, `evaluate` and `predict` are such
    data. `train_on_batch` and its like take the own part (`own_rows`).

    All processes must do the same: call `fit`, `fetch` and `predict`, which
    gives all rows to each, with as many batches. Where they do not, and where
    one of them dies or stops answering, the others raise `RuntimeError`; they
    neither wait for ever nor go on. A process that dies is noticed within
    seconds, one that is frozen within half a minute.

    Raises:
        ValueError: an argument is not as above; there are too few devices.
        RuntimeError: another strategy is in use, TensorFlow has started with
            too few devices, DTensor would merge all-reduces (see
            `all_reduces`), or processes have different axes or layouts.
    """

    def __init__(
        self, axes, *, layout_map=None, device_type=None, devices=None
    ):
        self.axes = meshes.check_axes(axes)
        layout_map = layout_maps.LayoutMap(layout_map)
        layout_map.check_axes(self.axes)
        self.layout_map = layout_map
        self.mesh = meshes.create(self.axes, device_type, devices)
        peers.agree("a mesh", 0, f"axes={self.axes}, {dict(layout_map)}")
        self.input_context = tf.distribute.InputContext(
            *placement.own_part(self.axes, self.num_processes, self.process_id)
        )
        all_reduces.check(self.mesh)
        super().__init__(
            extended.MeshExtended(self, self.mesh, self.axes, layout_map)
        )
        self._checked = weakref.WeakSet()
        self._told = False
        keras_trainer.install()
        recurrence.install()

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
            list of `report.Row`; `str` of one is a line of text.
        """
        return report.rows(model, self.axes)

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
        report.check(model, self)

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
