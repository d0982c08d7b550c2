"""`SparseMoE(jit_compile=True)`: the layer is an XLA program of its own."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

import moe_tf
from tests import every_router
from tests import sets

# All of them take two minutes.
ALL_CASES = list(
    itertools.product(every_router.SETTINGS, (None, 0.75), (False, True))
)
DEFAULT, THOROUGH = ("noisy_top_k", 0.75, False), ("hierarchical", None, True)
CASES = sets.split(
    ALL_CASES,
    [DEFAULT],
    [case for case in ALL_CASES if case not in (DEFAULT, THOROUGH)],
)


def step_of(layer, mask=None):
    """A step in a graph that is not compiled: outputs, losses, gradients."""

    @tf.function
    def step(x_TD):
        with tf.GradientTape() as tape:
            tape.watch(x_TD)
            y_TD = layer(x_TD, mask=mask, training=True)
            loss = tf.reduce_sum(tf.square(tf.cast(y_TD, x_TD.dtype)))
            loss += sum(layer.losses)
        variables = [v.value for v in layer.trainable_variables]
        gradients = tape.gradient(loss, [x_TD, *variables])
        gradients = map(tf.convert_to_tensor, gradients)
        vectors = [vector.value for vector in layer.balance.vectors]
        return [y_TD, *layer.losses, *gradients, *vectors]

    return step


def compiles(step, x_TD):
    """Whether a part of the step's graph must be compiled."""
    graph = step.get_concrete_function(x_TD).graph.as_graph_def()
    return any(
        function.attr["_XlaMustCompile"].b
        for function in graph.library.function
    )


@pytest.mark.parametrize("name,capacity_factor,masked", CASES)
def test_it_gives_what_the_plain_layer_gives(name, capacity_factor, masked):
    x_TD = tf.constant(every_router.tokens(23))
    mask_T = tf.constant(np.arange(23) % 5 > 0) if masked else None
    seen = []
    for jit_compile in (False, True):
        layer = every_router.layer(
            name,
            quiet=True,  # XLA draws other noise of the same seed
            capacity_factor=capacity_factor,
            jit_compile=jit_compile,
        )
        step = step_of(layer, mask_T)
        assert compiles(step, x_TD) == jit_compile
        seen.append(step(x_TD))
    for want, got in zip(*seen, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_a_functional_model_trains_the_same_and_logs_the_same():
    ids_BL = np.random.default_rng(0).integers(0, 9, (12, 7))
    seen = []
    for jit_compile in (False, True):
        keras.utils.set_random_seed(1)
        inputs = keras.Input((7,), dtype="int32")
        x = keras.layers.Embedding(9, 6, mask_zero=True)(inputs)
        layer = moe_tf.SparseMoE(
            8, 5, 2, gating="softmax_top_k", jit_compile=jit_compile, name="moe"
        )
        model = keras.Model(inputs, layer(layer(x)))
        model.compile("sgd", "mse", jit_compile=False)
        history = model.fit(
            ids_BL, np.ones((12, 7, 6)), batch_size=5, epochs=2, verbose=0
        ).history
        seen.append((history, model.get_weights()))
    (want, want_weights), (got, got_weights) = seen
    assert want.keys() == got.keys() and "moe_cv_load" in got
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-6)
    for want, got in zip(want_weights, got_weights, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.thorough
def test_recomputation_and_mixed_precision_work_inside():
    x_TD = tf.constant(every_router.tokens(23), tf.float32)
    seen = []
    for settings in ({}, {"recompute": True}):
        layer = every_router.layer(
            "noisy_top_k", dtype="mixed_bfloat16", jit_compile=True, **settings
        )
        seen.append(step_of(layer)(x_TD))
    for want, got in zip(*seen, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.thorough
def test_noise_is_drawn_anew_in_every_call():
    layer = every_router.layer("noisy_top_k", jit_compile=True)

    @tf.function
    def call(x_TD):
        return layer(x_TD, training=True), layer(x_TD, training=True)

    x_TD = tf.constant(every_router.tokens(23))
    outputs = [*call(x_TD), *call(x_TD)]
    for i, one in enumerate(outputs):
        for other in outputs[:i]:
            assert np.abs(one - other).max() > 0


def test_by_default_it_is_compiled_on_a_gpu_alone():
    layer = every_router.layer("noisy_top_k")
    on_gpu = bool(tf.config.list_logical_devices("GPU"))
    x_TD = tf.constant(every_router.tokens(5))
    assert compiles(step_of(layer), x_TD) == on_gpu
    with tf.device("CPU:0"):
        assert not compiles(step_of(layer), x_TD)


@pytest.mark.parametrize("value", ["yes", None, 1.5])
def test_another_value_is_refused(value):
    with pytest.raises(ValueError, match=f"`jit_compile`.*={value}"):
        moe_tf.SparseMoE(4, 5, jit_compile=value)
