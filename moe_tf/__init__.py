"""Sparsely-gated mixture-of-experts layers for TensorFlow and Keras 3."""

from moe_tf import layers as layers
from moe_tf import models as models
from moe_tf import optimizers as optimizers
from moe_tf.callbacks import LoadBalanceBoard as LoadBalanceBoard
from moe_tf.distribute import MeshStrategy as MeshStrategy
from moe_tf.layers import SparseMoE as SparseMoE
from moe_tf.version import __version__ as __version__
