"""Recording of the gates that a model's `SparseMoE` layers compute."""

import contextlib
from collections.abc import Iterator

import keras
import numpy as np
import tensorflow as tf

from moe_tf.routing import gating
from moe_tf.routing import router

# One for each open `recorded_gates`: lists of gates by the id of a layer.
_recordings = []


@contextlib.contextmanager
def recorded_gates(
    model: keras.Model,
) -> Iterator[dict[str, list[gating.Gates]]]:
    """Context that records the gates of every eager call of `model`.

    Tokens are in the order of the layer's flattened inputs. With `num_groups`
    masked tokens may follow, which fill up the last group. The expert id
    `num_experts` stands for no expert: for a masked token, and for a token
    with fewer than `K` experts.

    Args:
        model: `keras.Model` with `SparseMoE` layers at any depth.

    Yields:
        Dictionary from the name of a layer to a list of `Gates` of numpy
        arrays, one for each call of the layer within the context.

    Raises:
        ValueError: the model has no `SparseMoE` layer, two have the same
            name, or one is called in a graph, as by `fit` and `predict`.

    Example:

    >>> moe = moe_tf.SparseMoE(4, hidden_units=8, k=2, name="moe")
    >>> model = keras.Sequential([moe])
    >>> with moe_tf.layers.recorded_gates(model) as gates:
    ...     _ = model(np.ones((3, 5)))
    >>> weight_TK, expert_TK = gates["moe"][-1]
    >>> expert_TK.shape
    (3, 2)
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
        # Compared by identity: two recordings may be equal.
        _recordings[:] = [r for r in _recordings if r is not recording]


def record(layer: keras.layers.Layer, gates: gating.Gates) -> None:
    """Adds the gates of one call of `layer` to the open recordings."""
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
