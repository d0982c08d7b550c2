"""Types of annotations that several modules share."""

from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

# What `keras.ops` takes. A name's suffix gives the dimensions, the docstring
# the dtype.
Tensor = (
    tf.Tensor | tf.Variable | keras.KerasTensor | keras.Variable | np.ndarray
)
# Anything nested of tensors, as `tf.nest` takes it.
Nest = object
# A name that `keras.activations.get` takes, or a function of a tensor.
Activation = str | Callable[[Tensor], Tensor]
