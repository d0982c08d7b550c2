"""Two processes of two devices train as one process of four."""

import concurrent.futures
import os
import signal
import socket

import keras
import numpy as np
import pytest
import tensorflow as tf

from moe_tf.distribute import MeshStrategy
from moe_tf.distribute import cluster
from tests.distribute import equality_test
from tests.distribute import models
from tests.distribute import process


class Killed(keras.callbacks.Callback):
    """Ends the process, as a machine does that fails, after five steps."""

    def on_train_batch_end(self, batch, logs=None):
        if self.model.optimizer.iterations.numpy() == 5:
            os.kill(os.getpid(), signal.SIGKILL)


def train(addresses, index, killed=None):
    """History, weights and predictions; each process reads its own part."""
    count = max(1, len(addresses))
    if count > 1:
        cluster.start(cluster.Cluster(addresses, index), 4 // count)
    keras.utils.set_random_seed(0)
    with MeshStrategy({"batch": 4}, device_type="CPU").scope():
        model = models.language_model()
        model.compile(
            keras.optimizers.Adam(0.01),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
    x, y = (
        part.reshape(4, count, 16 // count, 6)[:, index].reshape(-1, 6)
        for part in equality_test.data()
    )
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(16 // count)
    history = model.fit(
        data,
        epochs=3,
        verbose=0,
        validation_data=data,
        callbacks=[Killed()] if killed == index else [],
    )
    predicted = model.predict(data, verbose=0)
    return history.history, model.get_weights(), predicted


def free_addresses(count):
    sockets = [socket.socket() for _ in range(count)]
    for listening in sockets:
        listening.bind(("127.0.0.1", 0))
    ports = [listening.getsockname()[1] for listening in sockets]
    for listening in sockets:
        listening.close()
    return [f"127.0.0.1:{port}" for port in ports]


def start(addresses, killed=None):
    pool = concurrent.futures.ThreadPoolExecutor()
    return [
        pool.submit(process.run, train, addresses, index, killed, timeout=120)
        for index in range(len(addresses))
    ]


def test_equals_one_process():
    history, weights, predicted = process.run(train, [], 0)
    for run in start(free_addresses(2)):
        other = run.result()
        for name, values in history.items():
            np.testing.assert_allclose(other[0][name], values, rtol=1e-6)
        for expected, actual in zip(weights, other[1], strict=True):
            np.testing.assert_allclose(actual, expected, atol=1e-6)
        np.testing.assert_allclose(other[2], predicted, atol=1e-6)


def test_a_lost_process_is_an_error():
    survivor, lost = start(free_addresses(2), killed=1)
    with pytest.raises(process.Failed, match=f"exit code -{signal.SIGKILL}"):
        lost.result()
    with pytest.raises(process.Failed, match="UnavailableError"):
        survivor.result(timeout=60)
