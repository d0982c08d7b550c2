import json
import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from moe_tf.layers import moe
from moe_tf.metrics import Perplexity
from moe_tf.metrics import WordCount
from moe_tf.models.language.scorer import MeanOverWords
from moe_tf.training import callbacks
from moe_tf.training import checkpoints
from moe_tf.training.variables import named_variables


def fit(tmp_path, num_moe=1, learning_rate=1e-3, epochs=2, extra=()):
    """Fits a stand-in for a scorer: the outputs are losses already."""
    inputs = keras.Input((3, 4))
    x = inputs
    for index in range(num_moe):
        x = moe.SparseMoE(4, 5, k=2, name=f"moe_{index}", seed=0)(x)
    x = keras.layers.Dense(1, activation="softplus")(x)
    model = keras.Model(inputs, keras.layers.Reshape((3,))(x))
    model.compile(
        keras.optimizers.SGD(learning_rate),
        MeanOverWords(),
        weighted_metrics=[Perplexity(), WordCount()],
        jit_compile=False,
    )
    model.optimizer.build(model.trainable_variables)
    named = named_variables(model)
    last = checkpoints.Checkpoints(tmp_path / "last", named)
    best = checkpoints.Checkpoints(tmp_path / "best", named, keep=1)
    x_BLD = np.random.default_rng(0).normal(size=(8, 3, 4))
    weights_BL = np.ones((8, 3))
    weights_BL[:, 2] = 0
    history = model.fit(
        x_BLD, np.zeros((8, 3)), sample_weight=weights_BL, batch_size=2,
        validation_data=(x_BLD, np.zeros((8, 3)), weights_BL),
        epochs=epochs, verbose=0,
        callbacks=[
            callbacks.DerivedLogs(),
            callbacks.KeepCheckpoints(last, best),
            *extra,
        ],
    ).history  # fmt: skip
    return history, last, best


def test_derived_logs_show_speed_and_the_worst_layer(tmp_path):
    history, _, _ = fit(tmp_path, num_moe=2)
    for epoch in range(2):
        layers = [
            history[f"moe_{index}_max_over_mean_load"][epoch]
            for index in range(2)
        ]
        assert history["worst_load"][epoch] == pytest.approx(max(layers))
        assert layers[0] != layers[1]
        # 16 real words in four batches of 2 * 2.
        assert history["words"][epoch] == 16
        assert history["words_per_second"][epoch] > 0


def test_a_model_without_experts_has_no_balance(tmp_path):
    history, _, _ = fit(tmp_path, num_moe=0)
    assert "worst_load" not in history


def test_the_last_and_the_best_state_are_kept(tmp_path):
    # Uphill, so that the first state is the best.
    history, last, best = fit(tmp_path, learning_rate=-0.1, epochs=3)
    perplexities = history["val_perplexity"]
    assert perplexities == sorted(perplexities)
    assert last.steps() == [8, 12] and best.steps() == [4]
    found = json.loads(
        (tmp_path / "last" / "step-00000012" / "metadata.json").read_text()
    )
    assert found["best_validation_perplexity"] == pytest.approx(perplexities[0])


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="`loss` is nan at step"):
        fit(tmp_path, learning_rate=math.inf)
    assert not (tmp_path / "last").exists()


class BreaksOff(keras.callbacks.Callback):
    """Raises what Keras takes for the end of the data."""

    def on_train_batch_end(self, batch, logs=None):
        if batch == 2:
            raise tf.errors.OutOfRangeError(None, None, "a full disk, say")


def test_an_epoch_cut_short_is_not_saved(tmp_path):
    with pytest.raises(RuntimeError, match="at step 3 instead of 4"):
        fit(tmp_path, extra=[BreaksOff()])
    assert not (tmp_path / "last").exists()


def test_progress_is_one_line_an_evaluation_without_a_terminal(
    tmp_path, capsys
):
    fit(tmp_path, extra=[callbacks.ProgressBar(8)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 4/8", "step 8/8"]
    for name in ("loss", "perplexity", "words_per_second", "worst_load"):
        assert f" {name} " in lines[-1]
