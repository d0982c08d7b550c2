"""How many expert parameters train in how much memory (Linux).

    python -m moe_tf.benchmarks.largest --num_experts=1536

One `SparseMoE` with recomputation and a capacity factor trains a few steps
with `FactoredAdam` through `fit`. Gradients of all experts stand in memory
beside the weights; with a capacity factor they are written by one product,
where dropless training collects them expert by expert and holds them twice
for a moment. The command is for a CPU; `train_on_gpu` is for
`many_devices`. The paper: up to 1 billion parameters on a GPU of 12 GB.
"""

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
    num_experts,
    *,
    width=512,
    hidden=1024,
    k=4,
    tokens=4096,
    steps=3,
    capacity_factor=1.25,
    num_layers=1,
):
    """Trains layers of experts; gives their parameters and the losses."""
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


def divide(num_parameters, width, hidden):
    """Layers and experts of each, of so many parameters in all or a few less.

    Ops of arrays of 2^31 entries are not all of them right on a GPU, so no
    kernel has as many.
    """
    of_kernel = width * hidden
    num_experts = num_parameters // (2 * of_kernel)
    num_layers = -(-num_experts // ((2**31 - 1) // of_kernel))
    return num_layers, num_experts // num_layers


def train_on_gpu(share, width=1024, hidden=4096):
    """As many experts as fit a share of what TensorFlow may use of a GPU.

    Weights are counted, 4 bytes a parameter; of gradients, those of one layer
    are there at a time.

    Yields:
        dict
    """
    limits = [
        device.memory_limit
        for device in device_lib.list_local_devices()
        if device.device_type == "GPU"
    ]
    num_layers, num_experts = divide(int(share * limits[0] / 4), width, hidden)
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
        "GiB there": limits[0] / 2**30,
        "million parameters a GiB": parameters / peak * 2**30 / 1e6,
    }


def main(argv):
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
