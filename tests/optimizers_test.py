import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from moe_tf.layers import moe
from moe_tf.optimizers import FactoredAdam
from tests import sets

EXPERTS = (3, 4, 6)
SHAPES = [(), (5,), (4, 6), EXPERTS, (2, 3, 4, 5)]
BETAS = [(0.0, 0.99), (0.8, 0.9), (0.5, 0)]
MATCHES = [
    (shape, *betas, jit_compile)
    for shape in SHAPES
    for betas in BETAS
    for jit_compile in (False, True)
]


def reference(weight, gradients, rates, beta_1=0.0, beta_2=0.98):
    """The weight after every step, one matrix and one entry at a time."""
    if weight.ndim > 2:
        apart = zip(weight, np.moveaxis(gradients, 1, 0), strict=True)
        experts = [reference(w, g, rates, beta_1, beta_2) for w, g in apart]
        return np.stack(experts, axis=1)
    moment, whole, history = np.zeros_like(weight), np.zeros_like(weight), []
    row, column = np.zeros(weight.shape[:1]), np.zeros(weight.shape[-1:])
    for step, (g, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        moment = beta_1 * moment + (1 - beta_1) * g
        whole = beta_2 * whole + (1 - beta_2) * g**2
        root = np.sqrt(whole / (1 - beta_2**step)) + 1e-10
        if weight.ndim == 2:
            row = beta_2 * row + (1 - beta_2) * (g**2).mean(1)
            column = beta_2 * column + (1 - beta_2) * (g**2).mean(0)
            for i, j in np.ndindex(*weight.shape):
                parts = np.array([row[i], column[j], row.mean()])
                r, c, mean = np.sqrt(parts / (1 - beta_2**step)) + 1e-10
                root[i, j] = r * c / mean
        weight = weight - rate * moment / (1 - beta_1**step) / root
        history.append(weight)
    return np.stack(history)


def draw(*shape, seed=0, dtype="float64"):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def train(optimizer, start, gradients, jit_compile=None):
    """The weight after every step with the given gradients."""
    weight = keras.Variable(start, dtype=start.dtype, name="kernel")
    optimizer.build([weight])

    def apply(gradient):
        optimizer.apply([gradient])

    if jit_compile is not None:
        apply = tf.function(apply, jit_compile=jit_compile)
    history = []
    for gradient in gradients:
        apply(keras.ops.convert_to_tensor(gradient))
        history.append(np.array(weight))
    return np.stack(history)


@pytest.mark.parametrize(
    "shape,beta_1,beta_2,jit_compile",
    sets.split(
        MATCHES,
        # Under XLA a matrix alone: a program takes half a second.
        [
            row
            for row in MATCHES
            if not row[-1] or row == (SHAPES[2], *BETAS[0], True)
        ],
    ),
)
def test_matches_one_entry_at_a_time(shape, beta_1, beta_2, jit_compile):
    start, gradients = draw(*shape, seed=1), draw(6, *shape)
    gradients[3] *= 100  # so that steps are not all alike
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)
    optimizer = FactoredAdam(schedule, beta_1, beta_2)
    got = train(optimizer, start, gradients, jit_compile)
    rates = [float(schedule(step)) for step in range(6)]
    want = reference(start, gradients, rates, beta_1, beta_2)
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("beta_1", [0.0, 0.875])
def test_is_adam_where_squares_have_rank_one(beta_1):
    # Signs are free, and so are sizes from step to step and expert to expert.
    row, column = np.exp(2 * draw(3, 4, 1)), np.exp(2 * draw(3, 1, 6, seed=1))
    size = np.exp(draw(8, 1, 1, 1, seed=2))
    gradients = np.sign(draw(8, *EXPERTS, seed=3)) * size * row * column
    start = draw(*EXPERTS, seed=4)
    # Betas that float32 holds exactly, since Keras's Adam rounds them.
    betas = {"beta_1": beta_1, "beta_2": 1 - 2**-9, "epsilon": 1e-12}
    np.testing.assert_allclose(
        train(FactoredAdam(0.1, **betas), start, gradients),
        train(keras.optimizers.Adam(0.1, **betas), start, gradients),
        rtol=1e-9,
        atol=1e-9,
    )


@pytest.mark.parametrize("beta_1", [0.0, 0.9])
def test_an_expert_does_not_feel_its_neighbours(beta_1):
    start, gradients = draw(*EXPERTS, seed=1), draw(5, *EXPERTS)
    others = gradients.copy()
    others[2:, 1] *= 1e6
    got, want = (
        train(FactoredAdam(0.1, beta_1=beta_1), start, g)
        for g in (others, gradients)
    )
    np.testing.assert_array_equal(got[:, [0, 2]], want[:, [0, 2]])
    assert np.abs(got[2:, 1] - want[2:, 1]).max() > 0.1


@pytest.mark.parametrize("dtype,rtol", [("float32", 1e-4), ("float64", 1e-6)])
def test_an_expert_without_tokens_waits(dtype, rtol):
    start = draw(*EXPERTS, seed=1, dtype=dtype)
    gradients = draw(6, *EXPERTS, dtype=dtype)
    gradients[:3, 1] = 0  # its first token comes in step 3
    gradients[:, 2] = 0
    gradients[4, 0] = 0
    gradients[:, 0, 2] = 0  # a row that never gets any
    got = train(FactoredAdam(0.1), start, gradients, jit_compile=False)
    np.testing.assert_array_equal(got[:3, 1], [start[1]] * 3)
    np.testing.assert_array_equal(got[:, 2], [start[2]] * 6)
    np.testing.assert_array_equal(got[4, 0], got[3, 0])
    np.testing.assert_array_equal(got[:, 0, 2], [start[0, 2]] * 6)
    assert (np.abs(np.diff(got[2:, 1], axis=0)) > 1e-4).all()
    want = reference(start, gradients, [0.1] * 6)
    np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("size", [1e-45, 1e-30, 1e-12, 1e12])
def test_gradients_of_any_size_give_finite_steps(size):
    gradients = (draw(3, *EXPERTS) * size).astype("float32")
    got = train(FactoredAdam(0.1), np.zeros(EXPERTS, "float32"), gradients)
    assert np.isfinite(got).all()
    # Epsilon quiets what is far below it, as Adam's does.
    assert (np.abs(got).max() < 1e-10) == (size < 1e-20)


@pytest.mark.parametrize("beta_1", [0.0, 0.9])
def test_sparse_gradients_are_those_of_the_dense(beta_1):
    values, ids = draw(4, 5, 3), np.array([1, 4, 1, 0, 4])  # ids that repeat
    sparse = [tf.IndexedSlices(v, ids, (6, 3)) for v in values]
    dense, start = np.zeros((4, 6, 3)), draw(6, 3, seed=1)
    for gradient, value in zip(dense, values, strict=True):
        np.add.at(gradient, ids, value)
    got = train(FactoredAdam(0.1, beta_1=beta_1), start, sparse)
    want = train(FactoredAdam(0.1, beta_1=beta_1), start, dense)
    np.testing.assert_allclose(got, want, rtol=1e-12)
    np.testing.assert_array_equal(got[-1, [2, 3, 5]], start[[2, 3, 5]])


def run_alone(code, *arguments):
    command = [sys.executable, "-c", code, *arguments]
    told = subprocess.run(command, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    return told.stdout


DTENSOR = """
import keras, numpy as np, tensorflow as tf
from tensorflow.experimental import dtensor
from moe_tf.optimizers import FactoredAdam

dtensor.initialize_accelerator_system("CPU")
mesh = dtensor.create_mesh([("expert", 1)], devices=["CPU:0"])

def place(value):
    value = tf.convert_to_tensor(value() if callable(value) else value)
    layout = dtensor.Layout.replicated(mesh, value.shape.rank)
    return dtensor.copy_to_mesh(value, layout)

def creator(next_creator, initial_value, name, **kwargs):
    return dtensor.DVariable(place(initial_value), name=name)

start, *gradients = np.random.default_rng(0).normal(size=(4, 3, 4, 6))
plain = FactoredAdam(0.1)
kernel = keras.Variable(start, name="kernel")
with tf.variable_creator_scope(creator):
    meshed = FactoredAdam(0.1)
    meshed_kernel = keras.Variable(start, name="kernel")
    meshed.build([meshed_kernel])
step = tf.function(lambda gradient: meshed.apply([gradient]))
for gradient in gradients:
    plain.apply([tf.convert_to_tensor(gradient)], [kernel])
    step(place(gradient))
np.testing.assert_allclose(kernel, meshed_kernel, rtol=1e-6, atol=1e-6)
assert type(meshed.variables[-1].value) is dtensor.DVariable
print("equal")
"""


@pytest.mark.thorough
def test_trains_on_a_mesh_of_dtensor():
    # DTensor has no layout rule for some operations; one device shows it.
    assert "equal" in run_alone(DTENSOR)


def expert_model(optimizer, jit_compile=False):
    """A compiled model whose first kernel has three axes."""
    keras.utils.set_random_seed(3)
    experts = keras.layers.EinsumDense(
        "bed,edf->bef", (2, 5), bias_axes="ef", activation="tanh"
    )
    head = [keras.layers.Flatten(), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((2, 3)), experts, *head])
    model.compile(optimizer, "mse", jit_compile=jit_compile)
    return model


def fit(model, epochs):
    x, y = draw(24, 2, 3), draw(24, 1, seed=1)
    model.fit(x, y, batch_size=8, epochs=epochs, shuffle=False, verbose=0)
    return model


def test_slots_are_named_by_their_weights_when_creators_are_replaced():
    created, want = {}, {}

    def creator(next_creator, **kwargs):
        variable = next_creator(**kwargs)
        created[kwargs["name"]] = tuple(variable.shape)
        return variable

    optimizer = FactoredAdam(beta_1=0.9, name="diet")
    model = expert_model(optimizer)
    with tf.variable_creator_scope(creator):
        optimizer.build(model.trainable_variables)
    for weight in model.trainable_variables:
        path, shape = weight.path.replace("/", "_"), tuple(weight.shape)
        want[f"{path}_momentum"] = shape
        if len(shape) == 1:
            want[f"{path}_velocity"] = shape
        else:
            want[f"{path}_velocity_row"] = shape[:-1]
            want[f"{path}_velocity_column"] = (*shape[:-2], shape[-1])
    slots = optimizer.variables[2:]  # after the step and the learning rate
    assert {slot.path: tuple(slot.shape) for slot in slots} == {
        f"diet/{name}": shape for name, shape in want.items()
    }
    assert created.items() >= want.items()


@pytest.mark.parametrize("beta_1", [0.0, sets.thorough(0.9)])
def test_training_resumes_from_a_saved_model(tmp_path, beta_1):
    schedule = keras.optimizers.schedules.InverseTimeDecay(0.1, 2, 0.5)

    def model():
        return expert_model(FactoredAdam(schedule, beta_1=beta_1))

    fit(model(), 2).save(tmp_path / "model.keras")
    resumed = fit(keras.models.load_model(tmp_path / "model.keras"), 3)
    straight = fit(model(), 5)
    assert isinstance(resumed.optimizer, FactoredAdam)
    got, want = (
        [*m.variables, *m.optimizer.variables] for m in (resumed, straight)
    )
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "arguments",
    [
        {"beta_1": 0.9},
        *map(sets.slow, ({}, {"gradient_accumulation_steps": 2})),
    ],
)
def test_xla_trains_alike(arguments):
    plain, compiled = (
        fit(expert_model(FactoredAdam(0.05, **arguments), jit_compile), 4)
        for jit_compile in (False, True)
    )
    for a, b in zip(plain.get_weights(), compiled.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_configuration_survives():
    schedule = keras.optimizers.schedules.CosineDecay(0.5, 10)
    own = {"beta_1": 0.5, "beta_2": 0.75, "epsilon": 1e-4, "name": "diet"}
    optimizer = FactoredAdam(schedule, weight_decay=0.1, **own)
    stored = keras.optimizers.serialize(optimizer)
    assert stored["registered_name"] == "moe_tf>FactoredAdam"
    again = keras.optimizers.deserialize(stored)
    assert type(again) is FactoredAdam
    assert again.get_config() == optimizer.get_config()
    assert again.get_config().items() >= {**own, "weight_decay": 0.1}.items()
    assert float(again.learning_rate) == 0.5


def scale_down(g):
    return g * 0.5 / max(np.sqrt((g**2).sum()), 0.5)


@pytest.mark.parametrize(
    "arguments,seen",
    [
        ({"clipnorm": 0.5}, scale_down),
        ({"global_clipnorm": 0.5}, scale_down),
        ({"clipvalue": 0.5}, lambda g: np.clip(g, -0.5, 0.5)),
        ({"loss_scale_factor": 64.0}, lambda g: g / 64),
    ],
)
def test_clipped_and_unscaled_gradients_count(arguments, seen):
    start, gradients = draw(*EXPERTS, seed=1), draw(4, *EXPERTS)
    gradients[1] /= 1000  # below every limit
    optimizer = FactoredAdam(0.1, **arguments)
    got = train(optimizer, start, gradients)
    clipped = np.stack([seen(g) for g in gradients])
    want = reference(start, clipped, [0.1] * 4)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    row = next(v for v in optimizer.variables if v.name.endswith("_row"))
    age = np.arange(4)[::-1, None, None]
    squares = 0.98**age * 0.02 * (clipped**2).mean(-1)
    np.testing.assert_allclose(row, squares.sum(0), rtol=1e-5)


def test_accumulated_gradients_count_as_their_mean():
    start, gradients = draw(*EXPERTS, seed=1), draw(6, *EXPERTS)
    optimizer = FactoredAdam(0.1, gradient_accumulation_steps=2)
    got = train(optimizer, start, gradients, jit_compile=False)
    means = gradients.reshape(3, 2, *EXPERTS).mean(1)
    want = reference(start, means, [0.1] * 3)
    np.testing.assert_allclose(got[1::2], want, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(got[2::2], got[1:-1:2])


def test_averaged_and_decayed_weights():
    start, gradients = draw(*EXPERTS, seed=1), draw(2, *EXPERTS)
    weight = keras.Variable(start, dtype="float64")
    optimizer = FactoredAdam(
        0.1, weight_decay=0.5, use_ema=True, ema_momentum=0.75
    )
    for gradient in gradients:
        optimizer.apply([tf.convert_to_tensor(gradient)], [weight])
    step_0, step_1 = reference(np.zeros(EXPERTS), gradients, [0.1] * 2)
    first = 0.95 * start + step_0  # the decay comes before the step
    last = 0.95 * first + step_1 - step_0
    np.testing.assert_allclose(weight, last, rtol=1e-6, atol=1e-6)
    optimizer.finalize_variable_values([weight])
    mean = 0.75 * first + 0.25 * last
    np.testing.assert_allclose(weight, mean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "policy", ["mixed_bfloat16", sets.thorough("bfloat16")]
)
def test_16_bit_models_train(policy):
    layers = [
        keras.layers.Embedding(11, 12, dtype=policy),
        moe.SparseMoE(4, 16, k=2, seed=1, dtype=policy),
        keras.layers.Dense(11, dtype=policy),
    ]
    model = keras.Sequential([keras.Input((8,), dtype="int32"), *layers])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(FactoredAdam(0.02), loss, jit_compile=False)
    ids = np.random.default_rng(0).integers(11, size=(64, 8))
    told = model.fit(ids, ids, batch_size=16, epochs=8, verbose=0)
    assert told.history["loss"][-1] < 0.3 * told.history["loss"][0]
    assert layers[-1].kernel.dtype == policy.replace(
        "mixed_bfloat16", "float32"
    )
    assert {v.dtype for v in model.optimizer.variables[2:]} == {"float32"}


def test_moments_of_16_bit_weights_follow_small_changes():
    # In bfloat16 the mean would never leave the first square.
    optimizer = FactoredAdam(0.1, beta_2=0.999)
    weight = keras.Variable(np.ones((2, 2)), dtype="bfloat16")
    for size in [1.0] + [2.0] * 50:
        optimizer.apply([tf.fill((2, 2), tf.cast(size, "bfloat16"))], [weight])
    want = 0.001 * 0.999**50 + 4 * (1 - 0.999**50)
    for slot in optimizer.variables[2:]:
        np.testing.assert_allclose(slot, [want] * 2, rtol=1e-3)


@pytest.mark.thorough
def test_reaches_the_loss_of_adam_on_ill_scaled_inputs():
    rng = np.random.default_rng(0)
    x_BED = rng.normal(size=(128, 4, 16)) * np.logspace(-2, 0, 16)
    goal_EDF = rng.normal(size=(4, 16, 8)) * np.logspace(1, 0, 16)[:, None]
    goal_EDF = goal_EDF * np.logspace(-1, 1, 8)
    y_BEF = np.einsum("BED,EDF->BEF", x_BED, goal_EDF)

    def loss_after(optimizer_class, **arguments):
        schedule = keras.optimizers.schedules.CosineDecay(1.0, 400)
        layer = keras.layers.EinsumDense("bed,edf->bef", (4, 8))
        model = keras.Sequential([keras.Input((4, 16)), layer])
        layer.kernel.assign(np.zeros((4, 16, 8)))
        model.compile(optimizer_class(schedule, **arguments), "mse")
        x, y = np.tile(x_BED, (100, 1, 1)), np.tile(y_BEF, (100, 1, 1))
        model.fit(x, y, batch_size=32, shuffle=False, verbose=0)
        return model.evaluate(x_BED, y_BEF, verbose=0) / (y_BEF**2).mean()

    adam = loss_after(keras.optimizers.Adam, beta_1=0.0)
    assert adam < 1e-2
    assert loss_after(FactoredAdam) < 2 * adam
    assert loss_after(keras.optimizers.SGD) > 5 * adam


@pytest.mark.parametrize(
    "field,value",
    [
        ("beta_1", 1.0),
        ("beta_1", -0.1),
        ("beta_2", 1.0),
        ("beta_2", float("nan")),
        ("epsilon", 0.0),
        ("learning_rate", 1),  # Keras's own refusal
    ],
)
def test_refuses(field, value):
    with pytest.raises(ValueError, match=f"`{field}` .* {field}={value}"):
        FactoredAdam(**{field: value})
