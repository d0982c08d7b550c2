"""The random numbers of one device, on a mesh."""

import contextlib

from tensorflow.python.framework import op_callbacks

from moe_tf.distribute import placement


@contextlib.contextmanager
def replicated_draws(mesh):
    """Makes random numbers of functions traced here independent of the mesh.

    Left to itself DTensor lays random ops out as what they are added to, and
    lets each device draw numbers of its own for its shard. Here every device
    draws the whole tensor, the one of a single device, and keeps its shard:
    exact, at the price of one tensor of the global shape for each draw.

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
            "The number of dimensions of random numbers must be known on a "
            f"mesh. Received: a draw of unknown rank by {op_type}"
        )
    spec = (None,) * output.shape.rank
    return placement.relayout(output, placement.layout(mesh, spec))
