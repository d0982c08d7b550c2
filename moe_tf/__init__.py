"""Sparsely-gated mixture-of-experts layers for TensorFlow and Keras 3.

`SparseMoE` replaces a dense layer of a Keras model by many experts, of which
each token uses a few. Train the model with `fit` on one device, or under
`MeshStrategy` on many, with the experts sharded over them; `LoadBalanceBoard`
writes how evenly the experts are used to TensorBoard. `layers` has the routers
that choose experts and the other layers of the paper's models, `losses` the
balancing losses, `metrics`, `optimizers`, `schedules` and `callbacks` what
training needs besides. `models` builds the paper's language and translation
models from these layers, `decoding` samples from them and searches with beams,
`evaluation` scores the results, and `distribute` holds meshes and layouts.
"""

from moe_tf import callbacks
from moe_tf import decoding
from moe_tf import distribute
from moe_tf import evaluation
from moe_tf import layers
from moe_tf import losses
from moe_tf import metrics
from moe_tf import models
from moe_tf import optimizers
from moe_tf import schedules
from moe_tf.callbacks import LoadBalanceBoard
from moe_tf.distribute import MeshStrategy
from moe_tf.layers import SparseMoE
from moe_tf.version import __version__

__all__ = [
    "LoadBalanceBoard",
    "MeshStrategy",
    "SparseMoE",
    "__version__",
    "callbacks",
    "decoding",
    "distribute",
    "evaluation",
    "layers",
    "losses",
    "metrics",
    "models",
    "optimizers",
    "schedules",
]


def __dir__() -> list[str]:
    return __all__
