"""An optimizer whose update is one program on a GPU."""

import tensorflow as tf

from moe_tf import xla


def compile_updates(optimizer):
    """Lets XLA compile the update, where the step around it is not compiled.

    Keras's Adam launches about ten kernels for each variable; small models
    wait for those longer than for their gradients. Gradients of gathers
    become dense, as they do in Keras's update.

    Args:
        optimizer: `keras.optimizers.Optimizer`, built.
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
