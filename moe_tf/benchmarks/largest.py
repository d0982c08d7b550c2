"""How many expert parameters train in how much memory, on a CPU (Linux).

    python -m moe_tf.benchmarks.largest --num_experts=1536

One `SparseMoE` with recomputation and a capacity factor trains a few steps
with `FactoredAdam` through `fit`. Gradients of all experts stand in memory
beside the weights; with a capacity factor they are written by one product,
where dropless training collects them expert by expert and holds them twice
for a moment. The paper: up to 1 billion parameters on a GPU of 12 GB.
"""

import keras
import tensorflow as tf
from absl import app
from absl import flags

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


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
    keras.utils.set_random_seed(0)
    layer = layers.SparseMoE(
        _NUM_EXPERTS.value,
        _HIDDEN.value,
        _K.value,
        capacity_factor=_CAPACITY_FACTOR.value,
        recompute=True,
        name="moe",
    )
    model = keras.Sequential([keras.Input((_WIDTH.value,)), layer])
    model.compile(optimizers.FactoredAdam(), "mse", jit_compile=False)
    x_TD = tf.random.stateless_normal(
        (_TOKENS.value, _WIDTH.value), seed=(1, 2)
    )
    losses = model.fit(
        x_TD,
        x_TD,
        batch_size=_TOKENS.value,
        epochs=_STEPS.value,
        verbose=0,
        shuffle=False,
    ).history["loss"]
    parameters = layer.experts.count_params()
    gib = memory.high_water() / 2**30
    print(
        f"{parameters:,} expert parameters, {_STEPS.value} steps of "
        f"{_TOKENS.value} tokens: loss {losses[0]:.4f} to {losses[-1]:.4f}, "
        f"peak {gib:.2f} GiB of the whole process, "
        f"{parameters / gib / 1e6:,.0f} million parameters per GiB"
    )


if __name__ == "__main__":
    app.run(main)
