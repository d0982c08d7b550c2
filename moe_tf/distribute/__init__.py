"""Training on many devices: a `tf.distribute` strategy over a DTensor mesh."""

from moe_tf.distribute.layout_map import LayoutMap as LayoutMap
from moe_tf.distribute.mesh_strategy import MeshStrategy as MeshStrategy
