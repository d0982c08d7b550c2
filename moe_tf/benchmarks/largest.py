"""Number of expert parameters that train in a given memory (Linux).

    python -m moe_tf.benchmarks.largest --num_experts=1536

One `SparseMoE` with recomputation and a capacity factor trains a few steps
with `FactoredAdam` through `fit`. The gradients of all experts are in memory
beside the weights. With a capacity factor one product writes the gradients;
dropless training collects them expert by expert and briefly holds them twice.
The command is for a CPU; `many_devices` calls `train_on_gpu`. The paper
(appendix D): up to 1 billion parameters on a GPU of 12 GB.
"""

from collections.abc import Iterator

import keras
import tensorflow as tf
from absl import app
from absl import flags
from tensorflow.python.client import device_lib

from moe_tf import layers
from moe_tf import optimizers
from moe_tf.benchmarks import memory

_NUM_EXPERTS = flags.DEFINE_integer("num_experts", 1536, "Experts.", 1)
_WIDTH = flags.DEFINE_integer("width", 512, "Width of a token.", 1)
_HIDDEN = flags.DEFINE_integer("hidden", 1024, "Hidden units an expert.", 1)
_K = flags.DEFINE_integer("k", 4, "Experts for each token.", 1)
_TOKENS = flags.DEFINE_integer("tokens", 4096, "Tokens a step.", 1)
_STEPS = flags.DEFINE_integer("steps", 3, "Training steps.", 2)
_CAPACITY_FACTOR = flags.DEFINE_float(
    "capacity_factor", 1.25, "None: nothing is dropped.", 0.01
)


def train_layers(
    num_experts: int,
    *,
    width: int = 512,
    hidden: int = 1024,
    k: int = 4,
    tokens: int = 4096,
    steps: int = 3,
    capacity_factor: float | None = 1.25,
    num_layers: int = 1,
) -> tuple[int, list[float]]:
    """Trains layers of experts.

    Returns:
        `(num_parameters, losses)`, of all experts and after each step.
    """
    keras.utils.set_random_seed(0)
    moes = [
        layers.SparseMoE(
            num_experts,
            hidden,
            k,
            capacity_factor=capacity_factor,
            recompute=True,
            jit_compile=False,
            name=f"moe_{index}",
        )
        for index in range(num_layers)
    ]
    model = keras.Sequential([keras.Input((width,)), *moes])
    model.compile(optimizers.FactoredAdam(), "mse", jit_compile=False)
    x_TD = tf.random.stateless_normal((tokens, width), seed=(1, 2))
    losses = model.fit(
        x_TD,
        x_TD,
        batch_size=tokens,
        epochs=steps,
        verbose=0,
        shuffle=False,
    ).history["loss"]
    return sum(layer.experts.count_params() for layer in moes), losses


def divide(num_parameters: int, width: int, hidden: int) -> tuple[int, int]:
    """Divides parameters among layers whose kernels have under 2^31 entries.

    Some of TensorFlow's GPU ops are wrong for larger arrays.

    Returns:
        `(num_layers, num_experts)`, the experts of one layer. Together they
        have `num_parameters` or slightly fewer.
    """
    of_kernel = width * hidden
    num_experts = num_parameters // (2 * of_kernel)
    num_layers = -(-num_experts // ((2**31 - 1) // of_kernel))
    return num_layers, num_experts // num_layers


def train_on_gpu(
    fraction: float, width: int = 1024, hidden: int = 4096
) -> Iterator[dict]:
    """Trains experts whose weights fill a fraction of TensorFlow's GPU memory.

    Weights take 4 bytes a parameter. Gradients are in memory for one layer at
    a time.

    Yields:
        dict with one record.
    """
    limits = [
        device.memory_limit
        for device in device_lib.list_local_devices()
        if device.device_type == "GPU"
    ]
    num_layers, num_experts = divide(
        int(fraction * limits[0] / 4), width, hidden
    )
    parameters, losses = train_layers(
        num_experts,
        width=width,
        hidden=hidden,
        k=2,
        num_layers=num_layers,
    )
    peak = tf.config.experimental.get_memory_info("GPU:0")["peak"]
    yield {
        "parameters": parameters,
        "layers": num_layers,
        "experts a layer": num_experts,
        "steps": len(losses),
        "first loss": losses[0],
        "last loss": losses[-1],
        "peak GiB": peak / 2**30,
        "GiB available": limits[0] / 2**30,
        "million parameters a GiB": parameters / peak * 2**30 / 1e6,
    }


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
    parameters, losses = train_layers(
        _NUM_EXPERTS.value,
        width=_WIDTH.value,
        hidden=_HIDDEN.value,
        k=_K.value,
        tokens=_TOKENS.value,
        steps=_STEPS.value,
        capacity_factor=_CAPACITY_FACTOR.value,
    )
    gib = memory.high_water() / 2**30
    print(
        f"{parameters:,} expert parameters, {_STEPS.value} steps of "
        f"{_TOKENS.value} tokens: loss {losses[0]:.4f} to {losses[-1]:.4f}, "
        f"peak {gib:.2f} GiB of the whole process, "
        f"{parameters / gib / 1e6:,.0f} million parameters per GiB"
    )


if __name__ == "__main__":
    app.run(main)
