"""Patch that unrolls Keras's recurrent layers on a mesh."""

import functools

from keras import layers

from moe_tf import sharding


def install() -> None:
    """Makes recurrent layers unroll on a mesh; a second call does nothing.

    DTensor can lay out neither the TensorLists, in which Keras's loops keep
    their outputs, nor cuDNN's op. Such a loop ends the process with a
    segmentation fault.
    """
    if hasattr(layers.RNN, "_unrolls_on_mesh"):
        return
    layers.RNN._unrolls_on_mesh = True
    for kind in (layers.RNN, layers.LSTM, layers.GRU):
        kind.inner_loop = _unrolled(kind.inner_loop)


def _unrolled(inner_loop):
    @functools.wraps(inner_loop)
    def run(self, *args, **kwargs):
        if self.unroll or sharding.axes() is None:
            return inner_loop(self, *args, **kwargs)
        self.unroll = True
        try:
            return inner_loop(self, *args, **kwargs)
        finally:
            self.unroll = False

    return run
