"""Evaluation in which MoE layers drop tokens, as they do in training."""

import contextlib
from collections.abc import Iterator

import keras

from moe_tf.layers.moe import SparseMoE


@contextlib.contextmanager
def clipped_evaluation(model: keras.Model) -> Iterator[None]:
    """Context in which MoE layers drop tokens in evaluation as in training.

    Compare with a plain evaluation, which drops nothing, to see what the
    capacity limit costs. A layer without a `capacity_factor` never drops.

    Args:
        model: compiled `keras.Model` with `SparseMoE` layers at any depth.

    Example:

    >>> moe = moe_tf.SparseMoE(2, hidden_units=4, k=1, capacity_factor=0.5)
    >>> model = keras.Sequential([keras.Input((3,)), moe])
    >>> model.compile(loss="mse")
    >>> x, y = np.ones((4, 3)), np.zeros((4, 3))
    >>> dropless = model.evaluate(x, y, verbose=0)
    >>> with moe_tf.layers.clipped_evaluation(model):
    ...     clipped = model.evaluate(x, y, verbose=0)
    >>> clipped < dropless  # dropped tokens give zeros
    True
    """
    layers = [
        layer
        for layer in model._flatten_layers()  # Keras has no public walk
        if isinstance(layer, SparseMoE)
    ]
    before = [layer.eval_capacity_factor for layer in layers]
    try:
        for layer in layers:
            layer.eval_capacity_factor = layer.capacity_factor
        _trace_again(model)
        yield
    finally:
        for layer, factor in zip(layers, before, strict=True):
            layer.eval_capacity_factor = factor
        _trace_again(model)


def _trace_again(model):
    # The factor is read when Keras traces the model.
    model.make_test_function(force=True)
    model.make_predict_function(force=True)
