import keras
import numpy as np
import pytest
import tensorflow as tf

import moe_tf
from tests import every_router
from tests import sets

E = every_router.NUM_EXPERTS


def one_layer(name, **kwargs):
    layer = every_router.layer(name, **kwargs)
    return keras.Sequential([layer]), layer


@pytest.mark.parametrize(
    "name", sets.split(every_router.SETTINGS, every_router.FEW)
)
def test_gates_of_every_router_are_those_of_the_output(name):
    model, layer = one_layer(name)
    x = every_router.tokens(2, 5)
    mask = np.arange(10).reshape(2, 5) < 9
    with moe_tf.layers.recorded_gates(model) as gates:
        y = np.asarray(layer(x, mask=tf.constant(mask)))
    ((weight_TK, expert_TK),) = gates["moe"]
    assert weight_TK.shape == expert_TK.shape
    assert weight_TK.shape[0] == 10
    assert (expert_TK[9] == E).all() and not weight_TK[9].any()

    want_TD = np.zeros((10, every_router.WIDTH))
    in_EDF, out_EFD = (np.asarray(w) for w in layer.experts.weights)
    x_TD = x.reshape(10, -1)
    for token, rank in np.argwhere(expert_TK < E):
        expert = expert_TK[token, rank]
        hidden_F = np.maximum(x_TD[token] @ in_EDF[expert], 0)
        want_TD[token] += weight_TK[token, rank] * hidden_F @ out_EFD[expert]
    np.testing.assert_allclose(y.reshape(10, -1), want_TD, rtol=1e-9)


def test_keeps_every_call_by_the_name_of_the_layer():
    model = keras.Sequential(
        [
            keras.Sequential([moe_tf.SparseMoE(4, 3, k=1, name="lower")]),
            moe_tf.SparseMoE(6, 3, k=2, name="upper"),
        ]
    )
    with moe_tf.layers.recorded_gates(model) as gates:
        model(np.ones((3, 6)))
        model(np.ones((8, 6)))
    shapes = {
        name: [call.weight_TK.shape for call in calls]
        for name, calls in gates.items()
    }
    assert shapes == {"lower": [(3, 1), (8, 1)], "upper": [(3, 2), (8, 2)]}


def test_keeps_nothing_after_the_block_nor_of_other_models():
    model, _ = one_layer("noisy_top_k")
    other, _ = one_layer("noisy_top_k")
    x = every_router.tokens(3)
    with pytest.raises(KeyError), moe_tf.layers.recorded_gates(model) as gates:
        other(x)
        raise KeyError
    model(x)
    assert gates == {"moe": []}
    with (
        moe_tf.layers.recorded_gates(model) as outer,
        moe_tf.layers.recorded_gates(model) as inner,
    ):
        model(x)
    assert len(outer["moe"]) == len(inner["moe"]) == 1


def test_refuses_a_graph():
    model, _ = one_layer("noisy_top_k")
    with moe_tf.layers.recorded_gates(model):
        with pytest.raises(ValueError, match="moe is called in a graph"):
            tf.function(model)(every_router.tokens(3))
    assert tf.function(model)(every_router.tokens(3)).shape == (3, 6)


@pytest.mark.parametrize("names", [[], ["a", "a"]])
def test_refuses_models_without_layers_or_with_the_same_names(names):
    layers = [moe_tf.SparseMoE(2, 2, k=1, name=name) for name in names]
    layers.append(keras.layers.Dense(2))
    model = keras.Sequential([keras.Sequential([layer]) for layer in layers])
    with pytest.raises(ValueError, match="`SparseMoE` layers"):
        with moe_tf.layers.recorded_gates(model):
            pass
