import keras
import numpy as np
import pytest
import tensorflow as tf

from moe_tf import tags
from moe_tf.models import LanguageModel
from moe_tf.models import NextWordScorer
from moe_tf.training import board
from tests.callbacks_test import read


class EveryBatch(keras.callbacks.Callback):
    """Recovers each batch's loss from Keras's running means."""

    def __init__(self):
        super().__init__()
        self.perplexities = []
        self.words = []

    def on_epoch_begin(self, epoch, logs=None):
        self.sums = np.zeros(2)

    def on_train_batch_end(self, batch, logs=None):
        sums = logs["words"] * np.array([1.0, np.log(logs["perplexity"])])
        words, nats = sums - self.sums
        self.sums = sums
        self.perplexities.append(np.exp(nats / words))
        self.words.append(words)


def test_points_are_means_since_the_point_before(tmp_path):
    scorer = NextWordScorer(LanguageModel("MoE-4", 9, width=6, seed=0))
    scorer.build()
    scorer.compile_for_words(keras.optimizers.SGD(0.5), jit_compile=False)
    rng = np.random.default_rng(0)
    tokens_BL = rng.integers(4, 9, (24, 5))
    weights_BL = (rng.random((24, 5)) < 0.8).astype("float32")
    inputs = {"tokens": tokens_BL, "targets": np.roll(tokens_BL, 1, axis=1)}
    data = (inputs, inputs["targets"], weights_BL)
    watch = EveryBatch()
    history = scorer.fit(
        *data[:2], sample_weight=weights_BL, batch_size=2, epochs=2,
        validation_data=data, verbose=0,
        callbacks=[board.TrainingBoard(tmp_path, update_freq=3), watch],
    ).history  # fmt: skip
    train, validation = read(tmp_path / "train"), read(tmp_path / "validation")
    for name in (tags.LOSS, tags.PERPLEXITY, tags.WORDS_PER_SECOND):
        assert [step for step, _ in train[name]] == list(range(3, 25, 3))
    nats, words = np.log(watch.perplexities), np.array(watch.words)
    want = [
        np.exp(np.average(nats[i : i + 3], weights=words[i : i + 3]))
        for i in range(0, 24, 3)
    ]
    got = [value for _, value in train[tags.PERPLEXITY]]
    np.testing.assert_allclose(got, want, rtol=1e-5)
    # Batches of equal size: the epoch's loss is the mean of its four points.
    losses = [value for _, value in train[tags.LOSS]]
    np.testing.assert_allclose(
        np.mean(np.reshape(losses, (2, 4)), axis=1), history["loss"], rtol=1e-5
    )
    assert train[tags.LEARNING_RATE][0][1] == pytest.approx(0.5)
    np.testing.assert_allclose(
        [value for _, value in validation[tags.PERPLEXITY]],
        history["val_perplexity"],
        rtol=1e-5,
    )
    assert validation[tags.LOSS][0][1] == pytest.approx(history["val_loss"][0])
    # One event file a run: TensorBoard follows only the newest.
    assert len(tf.io.gfile.glob(str(tmp_path / "*" / "events*"))) == 2
