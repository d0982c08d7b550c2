"""Exports and refusals of the GPU kernels, on a machine without a GPU."""

import re
import subprocess
import sys

import keras
import pytest
import tensorflow as tf

from moe_tf.experts import gpu
from tests import sets

needs_jax = pytest.mark.skipif(
    gpu.obstacle(64, 64, "float32", "relu") is not None,
    reason=str(gpu.obstacle(64, 64, "float32", "relu")),
)


def custom_calls(program):
    """Names of the custom calls of an exported program, one for each call."""
    from jax.extend.mlir import ir
    from jax.extend.mlir.dialects import stablehlo

    with ir.Context() as context:
        module = stablehlo.deserialize_portable_artifact(
            context, program.module
        )
    return re.findall(r"stablehlo.custom_call @([\w$.]+)", str(module))


def case(**changes):
    """A small one for a GPU."""
    return gpu._Case(
        slots=512,
        width=192,
        hidden_units=320,
        num_experts=2,
        dtype="bfloat16",
        kernel_dtype="float32",
        activation="silu",
        kept=True,
        platform="cuda",
    )._replace(**changes)


@needs_jax
@pytest.mark.parametrize(
    "activation",
    sets.split(
        gpu.ACTIVATIONS,
        ("gelu",),
        [name for name in gpu.ACTIVATIONS if name not in ("gelu", "silu")],
    ),
)
def test_recomputes_instead_of_keeping(activation):
    kept = case(activation=activation)
    recomputed = kept._replace(kept=False)
    # What goes into the activation is kept where the slope is of that.
    hidden = 2 if activation in ("gelu", "gelu_tanh", "silu") else 1
    answer, *rest = gpu._forward(kept).answers()
    assert answer == ((512, 192), "bfloat16")
    assert rest == [((512, 320), "bfloat16")] * hidden
    assert list(gpu._forward(recomputed).answers()) == [answer]
    assert len(custom_calls(gpu._forward(recomputed))) == 2
    assert len(custom_calls(gpu._backward(kept))) == 4
    assert len(custom_calls(gpu._backward(recomputed))) == 5


@needs_jax
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("activation", sets.split(gpu.ACTIVATIONS, ("gelu",)))
@pytest.mark.parametrize("kept", [sets.thorough(True), False])
def test_a_gpu_gets_custom_calls_that_xla_knows(dtype, activation, kept):
    one = case(dtype=dtype, activation=activation, kept=kept)
    for export in (gpu._forward, gpu._backward):
        program = export(one)
        assert program.platform == "CUDA"
        assert set(custom_calls(program)) == {"__gpu$xla.gpu.triton"}


OBSTACLES = [
    ((64, 100, "bfloat16", "relu"), "`hidden_units` .* hidden_units=100"),
    ((32, 128, "bfloat16", "relu"), "`width` .* width=32"),
    ((64, 128, "float64", "relu"), "dtype .* dtype='float64'"),
]


@pytest.mark.parametrize("arguments,reason", OBSTACLES)
def test_names_the_obstacle(arguments, reason):
    assert re.search(reason, gpu.obstacle(*arguments))


@needs_jax
def test_activations_that_are_known():
    def found(activation):
        return gpu.obstacle(64, 128, "float16", activation)

    for name in gpu.ACTIVATIONS:
        assert found(name) is None
    assert found("swish") is None  # another name of silu
    assert found(keras.activations.gelu) is None
    assert "activation='softplus'" in found("softplus")
    assert "`activation` must" in found(lambda x: x)


@pytest.mark.parametrize("version", [None, "0.11.2"])
def test_another_jax_is_an_obstacle(monkeypatch, version):
    monkeypatch.setattr(gpu, "_jax_version", lambda: version)
    reason = gpu.obstacle(64, 128, "bfloat16", "relu")
    assert "pip install 'moe_tf[kernels]'" in reason
    assert (f"jax {version} is" if version else "no jax is") in reason


@pytest.mark.parametrize(
    "capability,named", [((8, 0), "8.0"), ((10, 0), "10.0"), ((), "unknown")]
)
def test_another_gpu_is_an_obstacle(monkeypatch, capability, named):
    monkeypatch.setattr(gpu, "_capability", lambda: capability)
    reason = gpu.obstacle(64, 128, "bfloat16", "relu")
    assert f"compute_capability={named}" in reason


@needs_jax
def test_serves_an_h100(monkeypatch):
    monkeypatch.setattr(gpu, "_capability", lambda: (9, 0))
    assert gpu.obstacle(64, 128, "bfloat16", "relu") is None


@needs_jax
def test_refuses_stablehlo_that_tensorflow_cannot_read(monkeypatch):
    monkeypatch.setattr(gpu, "_STABLEHLO", (1, 2, 3))
    with pytest.raises(
        RuntimeError, match=r"StableHLO 1\.\d+.* 1\.2\.3 or old"
    ):
        gpu._forward.__wrapped__(case())


@pytest.mark.thorough
def test_imports_without_jax():
    code = """
import sys
sys.modules["jax"] = None
from moe_tf.experts import gpu
gpu.obstacle(64, 63, "bfloat16", "relu")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_float32_asks_whether_tf32_is_allowed():
    assert gpu.obstacle(64, 64, "float32", "relu") is None
    tf.config.experimental.enable_tensor_float_32_execution(False)
    try:
        reason = gpu.obstacle(64, 64, "float32", "relu")
        assert "TF32" in reason
        assert gpu.obstacle(64, 64, "bfloat16", "relu") is None
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(True)
