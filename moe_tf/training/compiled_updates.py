"""An optimizer whose update is one program on a GPU."""

import keras
import tensorflow as tf

from moe_tf import xla


def compile_updates(optimizer: keras.optimizers.Optimizer) -> None:
    """Compiles an optimizer's update with XLA, where the step is not compiled.

    Keras's Adam launches about ten kernels for each variable. In small models
    these take longer than the gradients. Gradients of gathers become dense,
    as they do in Keras's own update.

    Args:
        optimizer: a built optimizer, which is changed in place.
    """
    plain = optimizer.apply

    def apply(grads, trainable_variables=None):
        pairs = [
            (tf.convert_to_tensor(grad), index)
            for index, grad in enumerate(grads)
            if grad is not None
        ]

        def update(*dense):
            filled = [None] * len(grads)
            for tensor, (_, index) in zip(dense, pairs, strict=True):
                filled[index] = tensor
            plain(filled, trainable_variables)

        xla.compiled(update)(*(tensor for tensor, _ in pairs))

    optimizer.apply = apply
