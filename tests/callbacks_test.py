import subprocess
import sys

import keras
import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.util import tensor_util

from moe_tf import callbacks
from moe_tf import tags
from moe_tf.layers import moe
from tests import sets


def model_with_two_layers(num_experts=4):
    model = keras.Sequential(
        [
            moe.SparseMoE(num_experts, 5, k=2, name="low", seed=0),
            moe.SparseMoE(
                num_experts, 5, k=2, name="high", seed=1, capacity_factor=0.5
            ),
        ]
    )
    model.compile("adam", "mse", jit_compile=False)
    return model


def tokens(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def read(folder):
    """`{tag: [(step, value), ...]}` of the event files of a run."""
    events = event_accumulator.EventAccumulator(
        str(folder), size_guidance={event_accumulator.TENSORS: 0}
    ).Reload()
    return {
        tag: [
            (event.step, tensor_util.make_ndarray(event.tensor_proto))
            for event in events.Tensors(tag)
        ]
        for tag in events.Tags()["tensors"]
    }


class LastBatch(keras.callbacks.Callback):
    """Takes the vectors of every batch by itself."""

    def __init__(self):
        super().__init__()
        self.load = []
        self.dropped = []

    def on_train_batch_end(self, batch, logs=None):
        balance = self.model.layers[1].balance
        self.load.append(np.array(balance.load_E))
        self.dropped.append(
            np.sum(balance.dropped_E) / np.sum(balance.assigned_E)
        )


def test_scalars_are_those_of_the_batch(tmp_path):
    model, watch = model_with_two_layers(), LastBatch()
    board = callbacks.LoadBalanceBoard(tmp_path, update_freq=2)
    x_TD = tokens(40, 6)
    model.fit(
        x_TD, x_TD, batch_size=8, validation_data=(x_TD, x_TD), epochs=2,
        verbose=0, callbacks=[watch, board],
    )  # fmt: skip
    train = read(tmp_path / "train")
    steps = [2, 4, 6, 8, 10]
    want = [watch.load[step - 1] for step in steps]
    written = train[tags.balance("high", "cv_load")]
    assert [step for step, _ in written] == steps
    np.testing.assert_allclose(
        [value for _, value in written],
        [load_E.std() / load_E.mean() for load_E in want],
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        [v for _, v in train[tags.balance("high", "max_over_mean_load")]],
        [load_E.max() / load_E.mean() for load_E in want],
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        [v for _, v in train[tags.balance("high", "dropped_fraction")]],
        [watch.dropped[step - 1] for step in steps],
        rtol=1e-5,
    )
    assert max(watch.dropped) > 0
    for step, histogram in train[tags.load_per_expert("low")]:
        assert step in steps
        assert histogram[:, 2].sum() == 4  # every expert is counted once
    assert [s for s, _ in train[tags.WORST_MAX_OVER_MEAN_LOAD]] == steps


@pytest.mark.thorough
def test_validation_is_a_run_of_its_own_with_means_over_batches(tmp_path):
    model = model_with_two_layers()
    board = callbacks.LoadBalanceBoard(tmp_path)
    x_TD = tokens(40, 6)
    history = model.fit(
        x_TD, x_TD, batch_size=8, validation_data=(x_TD, x_TD), epochs=2,
        verbose=0, callbacks=[board],
    ).history  # fmt: skip
    validation = read(tmp_path / "validation")
    for layer in ("low", "high"):
        written = validation[tags.balance(layer, "cv_importance")]
        assert [step for step, _ in written] == [5, 10]
        np.testing.assert_allclose(
            [value for _, value in written],
            history[f"val_{layer}_cv_importance"],
            rtol=1e-5,
        )
    dropped = validation[tags.balance("high", "dropped_fraction")]
    assert [value for _, value in dropped] == [0, 0]  # evaluation drops none


@pytest.mark.slow
def test_tags_do_not_grow_with_experts(tmp_path):
    number = []
    for num_experts in (4, 64):
        folder = tmp_path / str(num_experts)
        board = callbacks.LoadBalanceBoard(folder, update_freq=1)
        model = model_with_two_layers(num_experts)
        model.fit(tokens(8, 6), tokens(8, 6), verbose=0, callbacks=[board])
        number.append(len(read(folder / "train")))
    # Four scalars, two losses and a histogram a layer; the second layer's
    # capacity; the worst layer.
    assert number[0] == number[1] == 2 * 7 + 1 + 1


def test_bad_frequency_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`update_freq`.*update_freq=0"):
        callbacks.LoadBalanceBoard(tmp_path, update_freq=0)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "steps_per_execution,accumulation,update_freq,want",
    [
        (1, 4, 2, [2, 4]),  # 16 batches are 4 steps
        # Keras calls back after 8 and 16.
        (8, None, 5, [8, 16]),
        sets.slow(1, None, 5, [5, 10, 15]),
    ],
)
def test_writes_by_the_optimizers_step(
    tmp_path, steps_per_execution, accumulation, update_freq, want
):
    model = keras.Sequential([moe.SparseMoE(4, 5, k=2, name="moe")])
    model.compile(
        keras.optimizers.SGD(0.1, gradient_accumulation_steps=accumulation),
        "mse",
        jit_compile=False,
        steps_per_execution=steps_per_execution,
    )
    board = callbacks.LoadBalanceBoard(tmp_path, update_freq=update_freq)
    x_TD = tokens(32, 6)
    model.fit(x_TD, x_TD, batch_size=2, verbose=0, callbacks=[board])
    written = read(tmp_path / "train")[tags.balance("moe", "cv_load")]
    assert [step for step, _ in written] == want


def test_layers_of_one_name_are_refused(tmp_path):
    models = [
        keras.Sequential([moe.SparseMoE(4, 5, k=2, name="moe")])
        for _ in range(2)
    ]
    model = keras.Sequential(models)
    model.compile("sgd", "mse")
    model.build((None, 6))
    board = callbacks.LoadBalanceBoard(tmp_path)
    with pytest.raises(ValueError, match="different names.*'moe', 'moe'"):
        model.fit(tokens(4, 6), tokens(4, 6), callbacks=[board], verbose=0)


@pytest.mark.thorough
def test_a_full_disk_is_an_error_and_not_the_end_of_the_data(tmp_path):
    script = f"""
import resource, signal
import numpy as np
import keras, moe_tf
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
model = keras.Sequential([moe_tf.SparseMoE(4, 5, k=2, name="moe")])
model.compile("sgd", "mse")
board = moe_tf.LoadBalanceBoard({str(tmp_path)!r}, update_freq=1)
x = np.ones((900, 6))
try:
    model.fit(x, x, batch_size=1, verbose=0, epochs=3, callbacks=[board],
              validation_data=(x[:2], x[:2]))
except OSError as error:
    print("told:", error)
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, timeout=200
    )
    assert b"told: Could not write to `log_dir`" in result.stdout, result.stderr
