import multiprocessing

import keras
import numpy as np
import pytest

from moe_tf.training import checkpoints
from moe_tf.training.variables import named_variables


@keras.saving.register_keras_serializable(package="moe_tf_test")
class Noisy(keras.layers.Layer):
    """Two generators, a nameless weight, and a layer inside."""

    def __init__(self, generators=None, **kwargs):
        super().__init__(**kwargs)
        self.generators = generators or [
            keras.random.SeedGenerator(seed) for seed in (3, 4)
        ]
        self.inner = keras.layers.Dropout(0.5, seed=1)

    def build(self, input_shape):
        self.scale_D = self.add_weight(shape=(input_shape[-1],))

    def call(self, inputs, training=False):
        outputs = inputs * self.scale_D
        for generator in self.generators:
            if training:
                outputs += keras.random.normal(
                    keras.ops.shape(inputs)[-1:], seed=generator
                )
        return self.inner(outputs, training=training)


class Tower(keras.Model):
    def __init__(self):
        super().__init__()
        dense = keras.layers.Dense
        self.blocks = [dense(3), dense(3, name="chosen_7"), dense(3)]
        self.noises = [Noisy(), keras.layers.Dropout(0.5, seed=2), Noisy()]
        self.normalize = keras.layers.BatchNormalization()
        lstm = keras.layers.LSTM(2, recurrent_dropout=0.1, seed=1)
        self.lstms = keras.layers.Bidirectional(lstm)

    def call(self, inputs, training=False):
        for block, noise in zip(self.blocks, self.noises, strict=True):
            inputs = noise(block(inputs), training=training)
        inputs = self.normalize(inputs, training=training)
        return self.lstms(inputs[:, None], training=training)


def functional():
    inputs = outputs = keras.Input((4,))
    for i in range(2):
        outputs = keras.layers.Dense(4)(outputs)
        outputs = keras.layers.Dropout(0.5, seed=i)(outputs)
    return keras.Model(inputs, Noisy()(outputs))


def build(make_model, optimizer=None):
    model = make_model()
    model(np.zeros((2, 4), "float32"))
    model.compile(optimizer or keras.optimizers.Adam(), "mse", metrics=["mae"])
    model.optimizer.build(model.trainable_variables)
    return model


def train(model, start, end):
    for step in range(start, end):
        draw = np.random.default_rng(step)
        model.train_on_batch(
            draw.normal(size=(8, 4)).astype("float32"),
            draw.normal(size=(8, 4)).astype("float32"),
        )


def values_of(model):
    return {n: np.array(v) for n, v in named_variables(model).items()}


def assert_same(got, want):
    assert list(got) == list(want)
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def go_on_elsewhere(make_model, directory, pipe):
    """In another process, which has built other things before."""
    keras.Sequential([keras.Input((1,)), keras.layers.Dense(1), Noisy()])
    model = build(make_model)
    saver = checkpoints.Checkpoints(directory, named_variables(model))
    assert saver.restore_latest() == {"step": 3}
    train(model, 3, 5)
    pipe.send(values_of(model))


@pytest.mark.parametrize(
    "make_model", [functional, pytest.param(Tower, marks=pytest.mark.slow)]
)
def test_a_restored_run_goes_on_bit_for_bit(tmp_path, make_model):
    first = build(make_model)
    train(first, 0, 3)
    saver = checkpoints.Checkpoints(tmp_path, named_variables(first))
    saver.save(3)
    saved = values_of(first)
    train(first, 3, 5)
    assert any((values_of(first)[n] != saved[n]).any() for n in saved)

    keras.utils.set_random_seed(2)
    second = build(make_model)
    saver = checkpoints.Checkpoints(tmp_path, named_variables(second))
    saver.restore_latest()
    assert_same(values_of(second), saved)
    train(second, 3, 5)
    assert_same(values_of(second), values_of(first))

    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    third = context.Process(
        target=go_on_elsewhere, args=(make_model, tmp_path, theirs)
    )
    third.start()
    theirs.close()
    try:
        assert_same(ours.recv(), values_of(first))
    finally:
        third.kill()
        third.join()


@pytest.mark.thorough
def test_holds_all_state_and_no_metrics():
    model = build(Tower)
    train(model, 0, 1)
    named = named_variables(model)
    assert len(model.metrics_variables) == 4
    variables = model.variables + model.optimizer.variables
    assert {id(v) for v in named.values()} == {id(v.value) for v in variables}
    assert sum("seed_generator_state" in name for name in named) == 9
    assert "model/tower/chosen_7/kernel" in named
    assert "model/tower/dense_1/kernel" in named
    assert "optimizer/adam/iteration" in named
    assert "optimizer/adam/learning_rate" in named
    assert "optimizer/adam/tower/dense_1/kernel/momentum" in named


def test_names_of_wrapped_optimizers():
    def names():
        adam = keras.optimizers.Adam(
            use_ema=True, gradient_accumulation_steps=2
        )
        wrapped = keras.optimizers.LossScaleOptimizer(adam)
        return list(named_variables(build(functional, wrapped)))

    first = names()
    assert first == names()
    assert "optimizer/loss_scale_optimizer/dynamic_scale" in first
    assert "optimizer/adam/dense_1/kernel/average" in first
    assert "optimizer/adam/dense_1/kernel/gradient_accumulator" in first


def test_a_slot_belongs_to_the_longest_path():
    inputs = keras.Input((4,))
    outputs = keras.layers.Dense(4, use_bias=False, name="a")(inputs)
    outputs = keras.layers.Dense(4, use_bias=False, name="a_kernel")(outputs)
    names = named_variables(build(lambda: keras.Model(inputs, outputs)))
    assert "optimizer/adam/a/kernel/momentum" in names
    assert "optimizer/adam/a_kernel/kernel/momentum" in names


def test_generators_of_one_name_are_numbered():
    class Sharing(keras.Model):
        def __init__(self):
            super().__init__()
            own = [keras.random.SeedGenerator(i, name="g") for i in (1, 2)]
            self.layers_of_one = [Noisy(own), Noisy(own)]

        def call(self, inputs):
            return self.layers_of_one[0](self.layers_of_one[1](inputs))

    model = build(Sharing)
    named = named_variables(model)
    assert [name for name in named if name.startswith("model/g/")] == [
        "model/g/seed_generator_state",
        "model/g/seed_generator_state:1",
    ]
    assert len({id(v) for v in named.values()}) == len(named)


def test_refuses_weights_of_one_path():
    class Twins(keras.Model):
        def __init__(self):
            super().__init__()
            self.twins = [keras.layers.Dense(4, name="twin") for _ in range(2)]

        def call(self, inputs):
            return self.twins[0](self.twins[1](inputs))

    with pytest.raises(ValueError, match="model/twins/twin/kernel"):
        named_variables(build(Twins))


def test_refuses_what_is_not_ready():
    model = functional()
    with pytest.raises(ValueError, match="compile"):
        named_variables(model)
    model.compile("adam", "mse")
    with pytest.raises(ValueError, match="optimizer.build"):
        named_variables(model)
