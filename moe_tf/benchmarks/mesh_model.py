"""The language model that grows with its mesh, or is shared by it."""

import contextlib
import statistics
import time

import keras
import numpy as np
import tensorflow as tf

from moe_tf.benchmarks import mesh_timing
from moe_tf.dispatch import capacity
from moe_tf.distribute import MeshStrategy
from moe_tf.distribute import collectives
from moe_tf.layers import moe
from moe_tf.models.language import variants
from moe_tf.models.language.model import LanguageModel
from moe_tf.models.language.scorer import NextWordScorer

_K = 4
_FACTOR = 1.25


def measure_model(
    axes,
    device_type,
    scaling,
    experts,
    words,
    groups,
    length=32,
    width=512,
    vocabulary=32_000,
    sampled=8192,
    policy="mixed_bfloat16",
    jit_compile="auto",
    steps=15,
):
    """Times steps of `MoE-<experts>` with Adam, through `fit`.

    One batch is repeated, so that reading data costs nothing.

    Args:
        axes: dict with one axis, `batch`; None for no mesh.
        device_type: `"CPU"` or `"GPU"`
        scaling: what the record is called.
        experts, words, groups: ints, in all. Without experts, 0, the model is
            the paper's `4xLSTM-512`.
        length: int, words of a sequence.
        width, vocabulary, sampled: of the model; `sampled` classes a step.
        policy: name of a dtype policy.
        jit_compile: of the `SparseMoE`; on a mesh it counts for nothing.
        steps: int, of which the median is taken.

    Yields:
        dicts.
    """
    strategy = MeshStrategy(axes, device_type=device_type) if axes else None
    size = axes["batch"] if axes else 1
    mesh_timing.reset_keras(policy)
    with strategy.scope() if strategy else contextlib.nullcontext():
        scorer = _build(
            experts, groups, width, vocabulary, sampled, jit_compile
        )
    data = _data(words // length, length, vocabulary)
    start = time.perf_counter()
    ops = collectives.list_collectives(_fit, scorer, data, 1)
    first = time.perf_counter() - start
    seconds = statistics.median(_fit(scorer, data, steps + 2)[2:])
    model = scorer.language_model
    multiplied = variants.count(model.variant).ops_per_timestep
    multiplied += width * min(sampled + 1, vocabulary)
    rate = words / seconds
    yield {
        "scaling": scaling,
        "mesh": str(axes) if axes else f"none, jit_compile={jit_compile}",
        "variant": model.variant.name,
        "words": words,
        "ms": 1e3 * seconds,
        "words/s": rate,
        # 2 a multiply-add, 3 products: forward, and two gradients.
        "TFLOP/s a device": 3 * 2 * multiplied * rate / size / 1e12,
        "first step s": first,
        **mesh_timing.collective_fields(ops),
        **mesh_timing.memory_fields(device_type, size),
    }
    if size == 1 or not experts:
        return
    dtype = keras.dtype_policies.get(policy).compute_dtype
    slots = capacity.expert_capacity(words // groups * _K, experts, _FACTOR)
    shape = groups, experts, slots, width
    alone, rate = mesh_timing.time_all_to_alls(strategy, shape, dtype, 4, steps)
    yield {
        "scaling": scaling,
        "mesh": f"{axes}, its four all-to-alls alone",
        "ms": 1e3 * alone,
        "share of the step": alone / seconds,
        "GB/s a device": rate,
    }


def _build(experts, groups, width, vocabulary, sampled, jit_compile):
    settings = {"width": width, "num_sampled": sampled, "seed": 0}
    variant = "4xLSTM-512"
    if experts:
        variant = f"MoE-{experts}"
        settings |= {"k": _K, "capacity_factor": _FACTOR, "num_groups": groups}
    model = LanguageModel(variant, vocabulary, **settings)
    for block in model.blocks:
        if isinstance(block, moe.SparseMoE):
            block.jit_compile = jit_compile
    scorer = NextWordScorer(model)
    scorer.build()
    optimizer = keras.optimizers.Adam(1e-3)
    optimizer.build(scorer.trainable_variables)
    scorer.compile_for_words(optimizer, jit_compile=False)
    return scorer


def _data(rows, length, vocabulary):
    """Words drawn about as often as in a text: `1 / rank`."""
    rng = np.random.default_rng(0)
    ids = np.exp(rng.uniform(0, np.log(vocabulary), (rows, length + 1)))
    ids = np.clip(ids.astype("int32"), 4, vocabulary - 1)
    tokens, targets = ids[:, :-1].copy(), ids[:, 1:].copy()
    batch = {"tokens": tokens, "targets": targets}, targets
    batch = *batch, np.ones_like(targets, "float32")
    return tf.data.Dataset.from_tensors(batch).repeat().prefetch(2)


def _fit(scorer, data, steps):
    """Seconds of each step."""
    ends = [time.perf_counter()]

    def end(step, logs):  # Which are on the host by now.
        ends.append(time.perf_counter())

    callback = keras.callbacks.LambdaCallback(on_train_batch_end=end)
    scorer.fit(data, steps_per_epoch=steps, verbose=0, callbacks=[callback])
    return np.diff(ends)
