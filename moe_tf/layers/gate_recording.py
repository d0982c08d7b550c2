"""The gates of a model's `SparseMoE` layers, kept as they are computed."""

import contextlib

import numpy as np
import tensorflow as tf

from moe_tf.routing import gating
from moe_tf.routing import router

_recordings = []  # those of the `with` blocks that are open


@contextlib.contextmanager
def recorded_gates(model):
    """Within, the gates of every eager call of `model` are kept.

        with recorded_gates(model) as gates:
            model(inputs)
        weight_TK, expert_TK = gates["moe"][-1]

    Tokens come in the order of the layer's flattened inputs; with
    `num_groups` masked ones may follow that fill up the last group. Expert
    `num_experts` is none: that of a masked token, and of one that uses fewer
    than `K`.

    Args:
        model: `keras.Model` with `SparseMoE` layers at any depth.

    Yields:
        A dictionary that fills up: by the name of a layer, a list with a
        `gating.Gates` of numpy arrays for each of its calls.

    Raises:
        ValueError: the model has no such layer, two have the same name, or
            one of them is called in a graph, as by `fit` and `predict`.
    """
    layers = [
        layer
        for layer in model._flatten_layers()  # Keras has no public walk
        if isinstance(getattr(layer, "router", None), router.Router)
    ]
    names = [layer.name for layer in layers]
    if not names or len(set(names)) < len(names):
        raise ValueError(
            "Recording gates needs a model with `SparseMoE` layers of "
            f"different names. Received: {model.name} with {names}"
        )
    gates = {name: [] for name in names}
    recording = {id(layer): gates[layer.name] for layer in layers}
    _recordings.append(recording)
    try:
        yield gates
    finally:
        # By identity: two may be equal.
        _recordings[:] = [r for r in _recordings if r is not recording]


def record(layer, gates):
    """Keeps the gates of one call of `layer` where they are recorded."""
    for recording in _recordings:
        if id(layer) not in recording:
            continue
        if not tf.executing_eagerly():
            raise ValueError(
                f"The layer {layer.name} is called in a graph, where its "
                "gates cannot be recorded. Call the model itself, `model(x)`, "
                "outside of a `tf.function`"
            )
        recording[id(layer)].append(
            gating.Gates(*(np.asarray(tensor) for tensor in gates))
        )
