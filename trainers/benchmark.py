"""Cost of the mixture-of-experts layer against a dense layer of equal work.

    moe-tf-benchmark --experts=8,32

Forward and backward of `SparseMoE` in training, its losses included, against
a dense layer of the same shape fed `tokens * k` rows, in one run: the calls of
all layers take turns, and each figure is a median. A ratio of 1 means that
routing, sending and balancing cost nothing beside the experts' products.
"""

import statistics
import time

import keras
import tensorflow as tf
from absl import app
from absl import flags

import moe_tf

_EXPERTS = flags.DEFINE_list("experts", ["8", "32"], "Numbers of experts.")
_TOKENS = flags.DEFINE_integer("tokens", 4096, "Tokens a call.", 1)
_WIDTH = flags.DEFINE_integer("width", 512, "Width of a token.", 1)
_HIDDEN = flags.DEFINE_integer("hidden", 1024, "Hidden units an expert.", 1)
_K = flags.DEFINE_integer("k", 4, "Experts for each token.", 1)
_REPEATS = flags.DEFINE_integer("repeats", 9, "Timed calls of each layer.", 3)


def dense_layer():
    return keras.Sequential(
        [
            keras.layers.Dense(
                _HIDDEN.value, activation="relu", use_bias=False
            ),
            keras.layers.Dense(_WIDTH.value, use_bias=False),
        ]
    )


def train_step(layer, num_rows):
    """A compiled forward and backward pass over `num_rows` fixed rows."""
    x_TD = tf.random.stateless_normal((num_rows, _WIDTH.value), seed=(1, 2))
    layer(x_TD)
    variables = [v.value for v in layer.trainable_variables]

    @tf.function
    def step(x_TD):
        with tf.GradientTape() as tape:
            tape.watch(x_TD)
            y_TD = layer(x_TD, training=True)
            loss = tf.reduce_mean(tf.square(y_TD)) + sum(layer.losses)
        gradients = tape.gradient(loss, [x_TD, *variables])
        # One entry of each: enough that none is optimised away, and no extra
        # pass over the weights of all experts.
        return tf.add_n([tf.reshape(g, (-1,))[0] for g in gradients])

    return lambda: float(step(x_TD))


def medians(steps):
    """Median seconds of each step, the steps taking turns."""
    times = {name: [] for name in steps}
    for step in steps.values():  # trace and warm up
        step()
        step()
    for _ in range(_REPEATS.value):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
    dense = f"dense, {_TOKENS.value * _K.value} rows"
    steps = {dense: train_step(dense_layer(), _TOKENS.value * _K.value)}
    for num_experts in map(int, _EXPERTS.value):
        layer = moe_tf.SparseMoE(num_experts, _HIDDEN.value, k=_K.value)
        name = f"SparseMoE, {num_experts} experts"
        steps[name] = train_step(layer, _TOKENS.value)
    seconds = medians(steps)
    print(f"{'forward + backward':32}{'ms':>10}{'ratio':>8}")
    for name, taken in seconds.items():
        ratio = taken / seconds[dense]
        print(f"{name:32}{1e3 * taken:>10.1f}{ratio:>8.2f}")


def run():
    app.run(main)


if __name__ == "__main__":
    run()
