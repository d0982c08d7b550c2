"""Appendix D: hidden activations computed again in the backward pass."""

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from moe_tf.layers import moe
from tests import sets


def results(recompute, jit_compile, **kwargs):
    """Outputs, losses and all gradients of one training step."""
    layer = moe.SparseMoE(
        6, 7, 2, recompute=recompute, seed=3, dtype="float64", **kwargs
    )
    layer.build((None, 5))
    rng = np.random.default_rng(0)
    variables = [v.value for v in layer.trainable_variables]
    for variable in variables:
        variable.assign(rng.normal(size=variable.shape))
    x_TD = tf.constant(rng.normal(size=(11, 5)))

    @tf.function(jit_compile=jit_compile)
    def step(x_TD):
        with tf.GradientTape() as tape:
            tape.watch(x_TD)
            y_TD = layer(x_TD, training=True)
            loss = tf.reduce_sum(tf.square(y_TD)) + sum(layer.losses)
        gradients = tape.gradient(loss, [x_TD, *variables])
        return [y_TD, layer.losses, *map(tf.convert_to_tensor, gradients)]

    return step(x_TD)


@pytest.mark.parametrize(
    "kwargs", [sets.thorough({}), {"capacity_factor": 0.8}]
)
@sets.JIT_COMPILE
def test_changes_no_value_and_no_gradient(jit_compile, kwargs):
    # The router's gradients hold those of its losses, which Keras's own
    # RematScope loses.
    kept = results(False, jit_compile, **kwargs)
    again = results(True, jit_compile, **kwargs)
    assert len(kept[1]) == len(again[1]) == 2
    for want, got in zip(kept, again, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.thorough
def test_trains_in_a_model_and_survives_saving(tmp_path):
    layer = moe.SparseMoE(4, 8, 2, recompute=True, name="moe")
    model = keras.Sequential([keras.Input((5,)), layer])
    model.compile("adam", "mse", jit_compile=False)
    x_TD = np.random.default_rng(0).normal(size=(32, 5))
    model.fit(x_TD, x_TD, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.get_layer("moe").experts.recompute
    np.testing.assert_array_equal(loaded(x_TD), model(x_TD))


@pytest.mark.parametrize(
    "scope",
    [
        {"mode": "full"},
        {"mode": "larger_than", "output_size_threshold": 1},
        {"mode": "list_of_layers", "layer_names": ["moe"]},
    ],
)
def test_keras_remat_scope_is_refused(scope):
    # Its losses print, and have no gradient.
    with keras.RematScope(**scope):
        layer = moe.SparseMoE(4, 8, 2, name="moe")
        with pytest.raises(ValueError, match="moe adds losses.*`recompute"):
            layer(np.ones((3, 5)))


@pytest.mark.parametrize(
    "scope",
    [
        {"mode": "activations"},
        {"mode": "list_of_layers", "layer_names": ["dense"]},
    ],
)
def test_keras_remat_scope_of_other_layers_is_fine(scope):
    with keras.RematScope(**scope):
        layer = moe.SparseMoE(4, 8, 2, name="moe")
        layer.build((None, 5))
        with tf.GradientTape() as tape:
            layer(np.ones((9, 5), "float32"), training=True)
            loss = sum(layer.losses)
        gradient = tape.gradient(loss, layer.router.noise_DE.value)
    assert np.abs(gradient).max() > 0


# Four layers, each with 96 MiB of hidden activations.
MEASURE = """
import pathlib, re, sys
import keras
import tensorflow as tf
import moe_tf

tf.config.threading.set_intra_op_parallelism_threads(1)
tf.config.threading.set_inter_op_parallelism_threads(1)
model = keras.Sequential([keras.Input((32,))] + [
    moe_tf.SparseMoE(4, 2048, 2, recompute=sys.argv[1] == "True", name=f"m{i}")
    for i in range(4)
])

@tf.function
def step(x_TD):
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(x_TD, training=True)) + sum(model.losses)
    return tape.gradient(loss, [v.value for v in model.trainable_variables])

def peak():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) / 1024

step(tf.ones((16, 32)))
before = peak()
step(tf.ones((6144, 32)))
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_falls():
    peaks = [
        float(
            subprocess.run(
                [sys.executable, "-c", MEASURE, str(recompute)],
                check=True,
                capture_output=True,
                timeout=200,
            ).stdout
        )
        for recompute in (False, True)
    ]
    # Kept, all four are there at once; recomputed, one at a time.
    assert peaks[0] > 4 * 96
    assert peaks[1] < 0.7 * peaks[0]
