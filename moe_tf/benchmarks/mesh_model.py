"""Weak and strong scaling of the language model on a mesh."""

import contextlib
import statistics
import time
from collections.abc import Iterator

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
    axes: dict[str, int] | None,
    device_type: str,
    scaling: str,
    experts: int,
    words: int,
    groups: int,
    length: int = 32,
    width: int = 512,
    vocabulary: int = 32_000,
    sampled: int = 8192,
    policy: str = "mixed_bfloat16",
    jit_compile: bool | str = "auto",
    steps: int = 15,
) -> Iterator[dict]:
    """Times steps of `MoE-<experts>` with Adam, through `fit`.

    One batch is repeated, so that reading data costs nothing.

    Args:
        axes: dict with one axis, `batch`; None for no mesh.
        device_type: `"CPU"` or `"GPU"`
        scaling: name of the record.
        experts, words, groups: ints, over all devices; `groups` are token
            groups. With 0 experts the model is the paper's `4xLSTM-512`.
        length: int, words of a sequence.
        width, vocabulary: the model's sizes.
        sampled: int, sampled classes a step.
        policy: name of a dtype policy.
        jit_compile: of the `SparseMoE`; has no effect on a mesh.
        steps: int, of which the median is taken.

    Yields:
        dicts: the step, then on several devices its all-to-alls alone.
    """
    strategy = MeshStrategy(axes, device_type=device_type) if axes else None
    size = axes["batch"] if axes else 1
    mesh_timing.reset_keras(policy)
    with strategy.scope() if strategy else contextlib.nullcontext():
        scorer = _build(
            experts, groups, width, vocabulary, sampled, jit_compile
        )
    data = _data(words // length, length, vocabulary)
    ops, first = _first_step(scorer, data)
    seconds = statistics.median(_fit(scorer, data, steps + 2)[2:])
    variant = scorer.language_model.variant
    multiplied = variants.count(variant).ops_per_timestep
    multiplied += width * min(sampled + 1, vocabulary)
    rate = words / seconds
    yield {
        "scaling": scaling,
        "mesh": str(axes) if axes else f"none, jit_compile={jit_compile}",
        "variant": variant.name,
        "words": words,
        "ms": 1e3 * seconds,
        "words/s": rate,
        # 2 a multiply-add, 3 products: forward, and two gradients.
        "TFLOP/s a device": 3 * 2 * multiplied * rate / size / 1e12,
        "first step s": first,
        **mesh_timing.collective_fields(ops),
        **mesh_timing.memory_fields(device_type, size),
    }
    if size > 1 and experts:
        dtype = keras.dtype_policies.get(policy).compute_dtype
        slots = capacity.expert_capacity(words // groups * _K, experts, _FACTOR)
        shape = groups, experts, slots, width
        record = mesh_timing.all_to_all_record(
            strategy, shape, dtype, steps, seconds
        )
        yield {"scaling": scaling, **record}


def _first_step(scorer, data):
    """Takes a step; returns its collectives and seconds."""
    start = time.perf_counter()
    ops = collectives.list_collectives(_fit, scorer, data, 1)
    return ops, time.perf_counter() - start


def _build(experts, groups, width, vocabulary, sampled, jit_compile):
    settings = {"width": width, "num_sampled": sampled, "seed": 0}
    variant = "4xLSTM-512"
    if experts:
        variant = f"MoE-{experts}"
        settings["moe"] = {
            "k": _K,
            "capacity_factor": _FACTOR,
            "num_groups": groups,
        }
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
    """Makes a dataset of words drawn with frequencies `1 / rank`."""
    rng = np.random.default_rng(0)
    ids = np.exp(rng.uniform(0, np.log(vocabulary), (rows, length + 1)))
    ids = np.clip(ids.astype("int32"), 4, vocabulary - 1)
    tokens, targets = ids[:, :-1].copy(), ids[:, 1:].copy()
    batch = {"tokens": tokens, "targets": targets}, targets
    batch = *batch, np.ones_like(targets, "float32")
    return tf.data.Dataset.from_tensors(batch).repeat().prefetch(2)


def _fit(scorer, data, steps):
    """Trains; returns the seconds of each step."""
    ends = [time.perf_counter()]

    def end(step, logs):  # Logs are on the host by now.
        ends.append(time.perf_counter())

    callback = keras.callbacks.LambdaCallback(on_train_batch_end=end)
    scorer.fit(data, steps_per_epoch=steps, verbose=0, callbacks=[callback])
    return np.diff(ends)
