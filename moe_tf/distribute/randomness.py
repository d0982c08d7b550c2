"""Random draws that do not depend on the mesh."""

import contextlib
from collections.abc import Iterator

from tensorflow.experimental import dtensor
from tensorflow.python.framework import op_callbacks

from moe_tf.distribute import placement


@contextlib.contextmanager
def replicated_draws(mesh: dtensor.Mesh) -> Iterator[None]:
    """Context in which traced functions draw the values of a single device.

    By default DTensor gives a random op the layout of its consumers, and each
    device draws other values for its shard. In this context every device
    draws the whole tensor, with the values of a single device, and keeps its
    shard. That is exact and costs one tensor of the global shape a draw.

    Args:
        mesh: `dtensor.Mesh`
    """

    def lay_out(op_type, inputs, attrs, outputs, op_name=None, graph=None):
        if graph is None or not op_type.startswith("Stateless"):
            return outputs
        if not any(kind in op_type for kind in _KINDS):
            return outputs
        return [_replicate(output, op_type, mesh) for output in outputs]

    op_callbacks.add_op_callback(lay_out)
    try:
        yield
    finally:
        op_callbacks.remove_op_callback(lay_out)


_KINDS = ("Random", "Normal", "Multinomial", "Shuffle", "ParameterizedTrunc")


def _replicate(output, op_type, mesh):
    if output.shape.rank is None:
        raise ValueError(
            "The number of dimensions of a random tensor must be known on a "
            f"mesh. Received: a draw of unknown rank by {op_type}"
        )
    spec = (None,) * output.shape.rank
    return placement.relayout(output, placement.layout(mesh, spec))
