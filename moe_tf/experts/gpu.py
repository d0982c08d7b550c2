"""Experts inside XLA on a GPU: only slots with tokens are computed.

The kernels are written in Pallas (`gpu_kernels`). When a function is traced,
jax exports them as StableHLO, which TensorFlow's XLA compiles with the rest
of the program. jax runs nothing, and a saved model does not need jax.
"""

import functools
import re
import typing
from importlib import metadata

import keras
import tensorflow as tf
from tensorflow.compiler.tf2xla.python import xla as tf2xla

from moe_tf.dispatch.plan import Plan
from moe_tf.types import Activation
from moe_tf.types import Tensor

# Slots in a block of the plan.
BLOCK = 128

# Width and hidden units must be multiples of this size.
_MULTIPLE = 64

_DTYPES = ("bfloat16", "float16", "float32")

# By the names in Keras; "gelu_tanh" is Keras's `gelu(x, approximate=True)`.
ACTIVATIONS = (
    "gelu", "gelu_tanh", "linear", "relu", "sigmoid", "silu", "tanh",
)  # fmt: skip

# Compute capability of the GPUs on which the kernels were tested.
_CAPABILITY = (9, 0)

# The version of jax whose StableHLO TensorFlow 2.21 reads, and the newest
# version of StableHLO that it reads.
_JAX = "0.9.0"
_STABLEHLO = (1, 13, 7)
_REMEDY = "`pip install 'moe_tf[kernels]'`"


def obstacle(
    width: int, hidden_units: int, dtype: str, activation: Activation
) -> str | None:
    """Returns the reason why `feed_forward` cannot compute experts, if any.

    Args:
        width, hidden_units: ints, `D` and `F`.
        dtype: name of the compute dtype.
        activation: name, or function of `keras.activations`.

    Returns:
        A sentence, or `None` if `feed_forward` can compute them.
    """
    if dtype not in _DTYPES:
        return f"The dtype must be one of {_DTYPES}. Received: dtype={dtype!r}"
    tf32 = tf.config.experimental.tensor_float_32_execution_enabled()
    if dtype == "float32" and not tf32:
        return (
            "In float32 the kernels round to TF32, which is switched off "
            "(tf.config.experimental.enable_tensor_float_32_execution)"
        )
    for name, value in (("width", width), ("hidden_units", hidden_units)):
        if value % _MULTIPLE:
            return (
                f"`{name}` must be a multiple of {_MULTIPLE}. "
                f"Received: {name}={value}"
            )
    capability = _capability()
    if capability not in (None, _CAPABILITY):
        return (
            "The tiles of the kernels are cut for the shared memory of GPUs of "
            f"compute capability {_dotted(_CAPABILITY)} (H100, H200). "
            f"Received: compute_capability={_dotted(capability)}"
        )
    version = _jax_version()
    if version != _JAX:
        installed = f"jax {version} is" if version else "no jax is"
        return (
            f"The kernels need jax {_JAX}, whose StableHLO TensorFlow 2.21 "
            f"reads, and {installed} installed: {_REMEDY}"
        )
    if _name(activation) is None:
        return (
            f"`activation` must be one of {ACTIVATIONS}. "
            f"Received: activation={activation!r}"
        )
    return None


@tf.autograph.experimental.do_not_convert
def feed_forward(
    x_SD: Tensor,
    in_EDF: Tensor,
    out_EFD: Tensor,
    plan: Plan,
    activation: Activation,
    recompute: bool = False,
) -> Tensor:
    """Computes the expert of each slot on the slot's row.

    Must be traced inside XLA. The kernels may have a higher precision than
    `x_SD`, such as float32 with bfloat16 rows: they are cast here, and their
    gradients are accumulated and returned in float32.

    Args:
        x_SD: bfloat16, float16 or float32; zeros in empty slots. A GPU
            multiplies float32 in TF32. `S` must be static.
        in_EDF, out_EFD: float.
        plan: `plans.Blocks` of `BLOCK` slots a block.
        activation: name, or function of `keras.activations`.
        recompute: bool, whether the hidden activations, `(S, F)`, are computed
            again in the backward pass instead of being kept; also the inputs
            of the activation, where its derivative needs them. Without a
            backward pass `True` is never slower.

    Returns:
        `(S, D)` of the dtype of `x_SD`; zeros in blocks that are not used.

    Raises:
        ValueError: for a reason that `obstacle` gives, or another plan.
    """
    _check(x_SD, in_EDF, plan, activation)
    case = _Case(
        slots=x_SD.shape[0],
        width=x_SD.shape[1],
        hidden_units=in_EDF.shape[2],
        num_experts=in_EDF.shape[0],
        dtype=x_SD.dtype.name,
        kernel_dtype=in_EDF.dtype.name,
        activation=_name(activation),
        kept=not recompute,
        platform=platform(),
    )

    def arguments(x_SD, *kernels):
        kernels = [tf.cast(kernel, x_SD.dtype) for kernel in kernels]
        return [x_SD, *kernels, plan.expert_N, plan.placed_E]

    @tf.custom_gradient
    def run(x_SD, *kernels):
        y_SD, *kept = _call(_forward(case), arguments(x_SD, *kernels))

        def gradient(dy_SD):
            # Variables are read again: a backward pass that is a program of
            # its own would copy the values that the forward pass read.
            inputs = arguments(x_SD, in_EDF, out_EFD)
            return _call(_backward(case), [*inputs, dy_SD, *kept])

        return y_SD, gradient

    return run(x_SD, in_EDF, out_EFD)


def platform() -> str:
    """Returns `"cuda"` if TensorFlow sees a GPU, else `"cpu"`.

    On a CPU the kernels are interpreted: with the same results, but slowly.
    """
    return "cuda" if tf.config.list_physical_devices("GPU") else "cpu"


class _Case(typing.NamedTuple):
    """Settings that an exported program depends on."""

    slots: int
    width: int
    hidden_units: int
    num_experts: int
    dtype: str
    kernel_dtype: str
    activation: str
    kept: bool
    platform: str

    def arrays(self):
        """Returns the shapes and dtypes of the arguments of `_forward`."""
        slots, width, hidden_units, num_experts, dtype = self[:5]
        return (
            ((slots, width), dtype),
            ((num_experts, width, hidden_units), dtype),
            ((num_experts, hidden_units, width), dtype),
            ((slots // BLOCK,), "int32"),
            ((num_experts,), "int32"),
        )


class _Program(typing.NamedTuple):
    """StableHLO, with the shapes and dtypes of its results."""

    module: bytes
    shapes: tuple
    dtypes: tuple
    version: int
    platform: str

    def answers(self):
        """Returns the shape and dtype of each result."""
        return zip(self.shapes, self.dtypes, strict=True)


@functools.cache
def _forward(case):
    kernels, products = _kernels()

    def forward(x_SD, in_EDF, out_EFD, expert_N, placed_E):
        return kernels.forward(
            x_SD,
            in_EDF,
            out_EFD,
            products.table(expert_N, placed_E),
            case.activation,
            keep=case.kept,
            interpret=case.platform == "cpu",
        )

    return _export(forward, case.arrays(), case.platform)


@functools.cache
def _backward(case):
    kernels, products = _kernels()

    def backward(x_SD, in_EDF, out_EFD, expert_N, placed_E, dy_SD, *kept):
        return kernels.backward(
            x_SD,
            in_EDF,
            out_EFD,
            products.table(expert_N, placed_E),
            dy_SD,
            *kept,
            activation=case.activation,
            dtype=case.kernel_dtype,
            interpret=case.platform == "cpu",
        )

    # The gradient of an answer has the shape and dtype of the answer.
    arrays = (*case.arrays(), *_forward(case).answers())
    return _export(backward, arrays, case.platform)


def _export(function, arrays, platform):
    exported = _kernels()[0].export(function, arrays, platform)
    module = exported.mlir_module_serialized
    # Bytecode begins with four bytes of magic and the name of its version.
    header = re.match(rb"ML\xefR.StableHLO_v(\d+)\.(\d+)\.(\d+)", module)
    version = tuple(map(int, header.groups())) if header else None
    if version is None or version > _STABLEHLO:
        raise RuntimeError(
            f"jax wrote StableHLO {_dotted(version)}, and TensorFlow reads "
            f"{_dotted(_STABLEHLO)} or older. Use jax {_JAX}: {_REMEDY}"
        )
    return _Program(
        module,
        tuple(answer.shape for answer in exported.out_avals),
        tuple(answer.dtype.name for answer in exported.out_avals),
        exported.calling_convention_version,
        platform.upper(),
    )


def _call(program, arguments):
    return tf2xla.call_module(
        arguments,
        version=program.version,
        module=program.module,
        Tout=program.dtypes,
        Sout=program.shapes,
        platforms=[program.platform],
    )


def _check(x_SD, in_EDF, plan, activation):
    reason = obstacle(
        x_SD.shape[1], in_EDF.shape[2], x_SD.dtype.name, activation
    )
    if reason:
        raise ValueError(reason)
    if plan.block_size is None:
        raise ValueError(
            "`plan` must be `plans.Blocks`. "
            f"Received: plan of {type(plan).__name__}"
        )
    slots, blocks = x_SD.shape[0], plan.expert_N.shape[0]
    if slots is None or blocks is None or slots != BLOCK * blocks:
        raise ValueError(
            f"`x_SD` must have {BLOCK} rows, a static number, for each block "
            "of `plan`. "
            f"Received: x_SD.shape={x_SD.shape}, blocks={blocks}"
        )


def _name(activation):
    """Returns the name of an activation in `ACTIVATIONS`, or None."""
    if activation in ACTIVATIONS:
        return activation
    function = keras.activations.get(activation)
    for name in ACTIVATIONS:
        if getattr(keras.activations, name, None) is function:
            return name
    return None


def _dotted(version):
    return ".".join(map(str, version)) if version else "unknown"


@functools.cache
def _capability():
    """Returns the compute capability of the GPU; None without a GPU.

    `()` for a GPU whose capability TensorFlow does not know.
    """
    for device in tf.config.list_physical_devices("GPU"):
        details = tf.config.experimental.get_device_details(device)
        return tuple(details.get("compute_capability", ()))
    return None


@functools.cache
def _jax_version():
    try:
        return metadata.version("jax")
    except metadata.PackageNotFoundError:
        return None


def _kernels():
    # jax is an optional dependency, and takes a second to import.
    from moe_tf.experts import gpu_kernels
    from moe_tf.experts import gpu_products

    return gpu_kernels, gpu_products
