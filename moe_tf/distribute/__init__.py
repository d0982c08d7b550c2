"""Training on many devices: a `tf.distribute` strategy over a DTensor mesh.

`MeshStrategy` trains a Keras model on a mesh; `LayoutMap` shards further
variables. `Cluster`, `resolve_cluster` and `start_cluster` connect several
processes. See `docs/mesh.md`.
"""

from moe_tf.distribute.cluster import Cluster
from moe_tf.distribute.cluster import resolve_cluster
from moe_tf.distribute.cluster import start_cluster
from moe_tf.distribute.layout_map import LayoutMap
from moe_tf.distribute.mesh_strategy import MeshStrategy

__all__ = [
    "Cluster",
    "LayoutMap",
    "MeshStrategy",
    "resolve_cluster",
    "start_cluster",
]


def __dir__() -> list[str]:
    return __all__
