import keras
import numpy as np
import pytest

from moe_tf import optimizers
from moe_tf.training import compiled_updates
from tests import sets


def trained(make_optimizer, compiled):
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [
            keras.layers.Embedding(20, 8),  # whose gradient is of rows
            keras.layers.Dense(8, activation="relu"),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(1),
        ]
    )
    model.build((None, 5))
    optimizer = make_optimizer()
    optimizer.build(model.trainable_variables)
    if compiled:
        compiled_updates.compile_updates(optimizer)
    model.compile(optimizer, "mse", jit_compile=False)
    random = np.random.default_rng(0)
    x, y = random.integers(0, 20, (64, 5)), random.normal(size=(64, 1))
    history = model.fit(x, y, batch_size=16, epochs=3, verbose=0)
    assert int(optimizer.iterations) == 12
    variables = [*model.trainable_variables, *optimizer.variables]
    return history.history["loss"], [v.numpy() for v in variables]


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda: keras.optimizers.Adam(
            keras.optimizers.schedules.ExponentialDecay(1e-2, 5, 0.9),
            global_clipnorm=1.0,
        ),
        sets.thorough(lambda: optimizers.FactoredAdam(1e-2)),
    ],
)
def test_trains_as_without(make_optimizer):
    want_loss, want = trained(make_optimizer, compiled=False)
    got_loss, got = trained(make_optimizer, compiled=True)
    np.testing.assert_allclose(got_loss, want_loss, rtol=1e-5)
    for got_value, want_value in zip(got, want, strict=True):
        np.testing.assert_allclose(got_value, want_value, rtol=1e-4, atol=1e-6)
