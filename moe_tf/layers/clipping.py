"""Evaluation with the drops of training."""

import contextlib

from moe_tf.layers.moe import SparseMoE


@contextlib.contextmanager
def clipped_evaluation(model):
    """Within, the layers of `model` drop at inference as they do in training.

    By how much capacity costs, the dropless evaluation beside it tells:

        dropless = model.evaluate(data)
        with moe_tf.layers.clipped_evaluation(model):
            clipped = model.evaluate(data)

    Layers without a `capacity_factor` drop nothing here either.

    Args:
        model: the `keras.Model` that is evaluated, with `SparseMoE` layers at
            any depth.
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
    for make in (model.make_test_function, model.make_predict_function):
        make(force=True)
