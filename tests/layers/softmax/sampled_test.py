import keras
import numpy as np
import pytest
import tensorflow as tf

from moe_tf.layers.softmax import sampled
from moe_tf.layers.softmax import token_chunks
from moe_tf.layers.softmax.sampled import SampledSoftmax
from tests import sets


def random_batch(num_tokens, width, vocabulary_size, dtype="float32"):
    rng = np.random.default_rng(0)
    features_TD = rng.normal(size=(num_tokens, width)).astype(dtype)
    kernel_VD = rng.normal(size=(vocabulary_size, width)).astype(dtype)
    targets_T = rng.integers(0, vocabulary_size, num_tokens).astype("int32")
    return features_TD, kernel_VD, targets_T


def layer_with(kernel_VD, **kwargs):
    layer = SampledSoftmax(len(kernel_VD), **kwargs)
    layer.build((None, kernel_VD.shape[1]))
    layer.set_weights([kernel_VD])
    return layer


def log_sum_exp(x):
    return np.log(np.exp(np.asarray(x, "float64")).sum(-1))


def probability(vocabulary_size):
    ids = np.arange(vocabulary_size)
    return np.log((ids + 2) / (ids + 1)) / np.log(vocabulary_size + 1)


def inclusion(vocabulary_size, num_sampled):
    return 1 - (1 - probability(vocabulary_size)) ** num_sampled


# The log-uniform draw.


def test_every_class_of_a_large_vocabulary_can_be_drawn():
    vocabulary_size = 793_471
    ids = np.arange(vocabulary_size)
    inside = np.log(ids + 1.5) / np.log(vocabulary_size + 1)
    got = sampled.log_uniform_ids(inside, vocabulary_size)
    np.testing.assert_array_equal(got, ids)


def test_draws_at_the_ends_stay_in_the_vocabulary():
    ends = np.array([0.0, 1.0 - 2.0**-53])
    for vocabulary_size in (1, 2, 1000, 793_471):
        got = sampled.log_uniform_ids(ends, vocabulary_size)
        assert list(np.asarray(got)) == [0, vocabulary_size - 1]


@pytest.mark.parametrize("num_sampled", [1, 10, 8192])
def test_inclusion_probability(num_sampled):
    got = sampled.log_inclusion(np.arange(500), 500, num_sampled)
    want = inclusion(500, num_sampled)
    np.testing.assert_allclose(np.exp(got), want, rtol=2e-5)


def test_classes_are_drawn_as_often_as_their_inclusion_probability():
    vocabulary_size, num_sampled, num_steps = 30, 10, 4000
    layer = layer_with(
        np.zeros((vocabulary_size, 1), "float32"),
        num_sampled=num_sampled,
        seed=5,
    )
    draw = tf.function(layer.draw)
    times_V = np.zeros(vocabulary_size)
    for _ in range(num_steps):
        times_V[np.unique(draw())] += 1
    q_V = inclusion(vocabulary_size, num_sampled)
    deviation_V = np.sqrt(q_V * (1 - q_V) / num_steps)
    assert (np.abs(times_V / num_steps - q_V) < 4 * deviation_V).all()


def test_same_seed_same_draws_and_every_step_others():
    kernel_VD = np.zeros((1000, 1), "float32")
    first, second, other = (
        layer_with(kernel_VD, num_sampled=20, seed=seed) for seed in (3, 3, 4)
    )
    steps = [np.asarray(first.draw()) for _ in range(3)]
    for step in steps:
        np.testing.assert_array_equal(step, second.draw())
    assert (steps[0] != steps[1]).any() and (steps[1] != steps[2]).any()
    assert (steps[0] != np.asarray(other.draw())).any()


# The sampled loss.


def test_sampled_loss_matches_numpy():
    features_TD, kernel_VD, targets_T = random_batch(9, 4, 12)
    layer = layer_with(kernel_VD, num_sampled=11, seed=7)
    drawn = np.asarray(layer_with(kernel_VD, num_sampled=11, seed=7).draw())
    assert len(set(drawn)) < 11 and set(drawn) & set(targets_T)
    got = layer(features_TD, targets_T, training=True)
    corrected_TV = features_TD @ kernel_VD.T - np.log(inclusion(12, 11))
    want = []
    for corrected_V, target in zip(corrected_TV, targets_T, strict=True):
        others = sorted(set(drawn) - {target})
        shown = corrected_V[[target, *others]]
        want.append(log_sum_exp(shown) - corrected_V[target])
    np.testing.assert_allclose(got, want, rtol=1e-4)


def test_target_among_the_draws_counts_once():
    # Class 0 is drawn with probability 1 - 1e-12 and has all the mass:
    # counted twice it would cost log 2.
    kernel_VD = np.full((200, 1), -20.0, "float32")
    kernel_VD[0] = 20.0
    layer = layer_with(kernel_VD, num_sampled=199, seed=0)
    for _ in range(5):
        nll = layer(np.ones((1, 1), "float32"), np.array([0]), training=True)
        assert 0 <= float(nll[0]) < 1e-6


def mean_over_draws(function, num_steps):
    compiled = tf.function(function)
    return np.mean([np.asarray(compiled()) for _ in range(num_steps)], axis=0)


@pytest.mark.thorough
def test_partition_function_is_estimated_without_bias():
    features_TD, kernel_VD, targets_T = random_batch(5, 4, 40)
    logits_TV = features_TD @ kernel_VD.T
    layer = layer_with(kernel_VD, num_sampled=15, seed=1)
    q_V = inclusion(40, 15)
    rows = np.arange(5), targets_T
    corrected_T = (logits_TV - np.log(q_V))[rows].astype("float32")

    def others():  # nll = log(exp(corrected) + others) - corrected
        nll_T = layer(features_TD, targets_T, training=True)
        return tf.exp(corrected_T) * tf.math.expm1(nll_T)

    num_steps = 4000
    got = mean_over_draws(others, num_steps)
    mass_TV = np.exp(logits_TV)
    mass_TV[rows] = 0
    # Class by class, the variance is mass^2 (1 - q) / q; covariances of a
    # fixed number of draws are negative.
    variance_T = (mass_TV**2 * (1 - q_V) / q_V).sum(1)
    error_T = np.abs(got - mass_TV.sum(1))
    assert (error_T < 4 * np.sqrt(variance_T / num_steps)).all()


def test_bias_of_loss_and_gradient_shrinks_with_more_draws():
    features_TD, kernel_VD, _ = random_batch(6, 4, 1000)
    features_TD *= 0.5
    targets_T = np.arange(6)

    def bias(num_sampled):
        layer = layer_with(kernel_VD, num_sampled=num_sampled, seed=2)

        def loss_and_gradient(training=True):
            features = tf.constant(features_TD)
            with tf.GradientTape() as tape:
                tape.watch(features)
                nll_T = layer(features, targets_T, training=training)
            gradient = tape.gradient(nll_T, features)
            return tf.concat([nll_T[:, None], gradient], axis=1)

        got = mean_over_draws(loss_and_gradient, 300)
        want = loss_and_gradient(training=False)
        return np.abs(got - want).mean(axis=0)

    few, some, many = (bias(number) for number in (20, 100, 900))
    assert few[0] > 4 * some[0] > 4 * many[0]
    assert few[1:].mean() > 2 * some[1:].mean() > 2 * many[1:].mean()
    assert many.max() < 0.05


@pytest.mark.parametrize("num_sampled", [None, 12, 13])
def test_training_is_exact_without_sampling(num_sampled):
    features_TD, kernel_VD, targets_T = random_batch(9, 4, 12)
    layer = layer_with(kernel_VD, num_sampled=num_sampled)
    np.testing.assert_array_equal(
        layer(features_TD, targets_T, training=True),
        layer(features_TD, targets_T, training=False),
    )


def test_gradient_of_the_kernel_touches_drawn_rows_alone():
    features_TD, kernel_VD, targets_T = random_batch(3, 4, 500)
    layer = layer_with(kernel_VD, num_sampled=10, seed=7)
    drawn = np.asarray(layer_with(kernel_VD, num_sampled=10, seed=7).draw())
    with tf.GradientTape() as tape:
        nll_T = layer(features_TD, targets_T, training=True)
    gradient = tape.gradient(nll_T, layer.kernel_VD.value)
    assert isinstance(gradient, tf.IndexedSlices)
    gradient = np.asarray(tf.convert_to_tensor(gradient))
    touched = set(np.flatnonzero(np.abs(gradient).sum(1)))
    assert touched == set(drawn) | set(targets_T)


# The whole softmax.


@pytest.mark.parametrize("num_tokens", [0, *map(sets.thorough, (1, 7, 8)), 9])
@pytest.mark.parametrize(
    "chunk_tokens", [sets.thorough(1), 4, sets.thorough(1000)]
)
def test_chunks_match_tensorflow(num_tokens, chunk_tokens):
    features, kernel, targets_T = random_batch(num_tokens, 4, 11, "float64")
    weights_T = np.random.default_rng(1).normal(size=num_tokens)
    spec = tf.TensorSpec((None, 4), tf.float64), tf.TensorSpec((None,), "int32")

    @tf.function(input_signature=spec)
    def chunked(features_TD, targets_T):
        return token_chunks.full_nll(
            features_TD, kernel_VD, targets_T, chunk_bytes=4 * 11 * chunk_tokens
        )

    def whole(features_TD, targets_T):
        logits_TV = tf.einsum("TD,VD->TV", features_TD, kernel_VD)
        return tf.nn.sparse_softmax_cross_entropy_with_logits(
            targets_T, logits_TV
        )

    kernel_VD = tf.Variable(kernel)
    features_TD = tf.constant(features)
    results = []
    for function in (chunked, whole):
        with tf.GradientTape() as tape:
            tape.watch(features_TD)
            nll_T = function(features_TD, targets_T)
            loss = tf.reduce_sum(nll_T * weights_T)
        gradients = tape.gradient(loss, [features_TD, kernel_VD])
        results.append((nll_T, *gradients))
    for got, want in zip(*results, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


def test_logits_of_all_tokens_never_stand_whole():
    features_TD, kernel_VD, targets_T = random_batch(64, 2, 100)

    @tf.function
    def gradients(features_TD, kernel_VD):
        nll_T = token_chunks.full_nll(
            features_TD, kernel_VD, targets_T, chunk_bytes=4 * 100 * 16
        )
        return nll_T, tf.gradients(nll_T, [features_TD, kernel_VD])

    arguments = tf.constant(features_TD), tf.constant(kernel_VD)
    graph = gradients.get_concrete_function(*arguments).graph.as_graph_def(
        add_shapes=True
    )
    nodes = [*graph.node]
    for function in graph.library.function:
        nodes += function.node_def
    sizes = {
        np.prod([dim.size for dim in shape.dim])
        for node in nodes
        for shape in node.attr["_output_shapes"].list.shape
        if all(dim.size >= 0 for dim in shape.dim)
    }
    assert 16 * 100 in sizes  # one chunk
    assert max(sizes) < 64 * 100


def test_whole_softmax_matches_numpy():
    features_TD, kernel_VD, targets_T = random_batch(6, 4, 12)
    layer = layer_with(kernel_VD, num_sampled=3)
    got = layer(features_TD.reshape(2, 3, 4), targets_T.reshape(2, 3))
    logits_TV = features_TD @ kernel_VD.T
    want_T = log_sum_exp(logits_TV) - logits_TV[np.arange(6), targets_T]
    assert got.shape == (2, 3)
    np.testing.assert_allclose(np.ravel(got), want_T, rtol=1e-5)
    np.testing.assert_allclose(layer.logits(features_TD), logits_TV, rtol=1e-4)


def test_huge_logits_stay_finite():
    kernel_VD = np.array([[1e4], [-1e4], [0.0]], "float32")
    layer = layer_with(kernel_VD, num_sampled=2, seed=0)
    for training in (False, True):
        features = tf.ones((3, 1))
        with tf.GradientTape() as tape:
            tape.watch(features)
            nll_T = layer(features, np.arange(3), training=training)
        assert np.isfinite(nll_T).all()
        assert np.isfinite(tape.gradient(nll_T, features)).all()


# Dtypes, compilation, saving.


@pytest.mark.parametrize("training", [False, True])
def test_mixed_precision_sums_in_float32(training):
    features_TD, kernel_VD, targets_T = random_batch(50, 32, 5000)
    kernel_VD *= 0.1
    results = []
    for dtype in ("float32", "mixed_bfloat16"):
        layer = layer_with(kernel_VD, num_sampled=500, seed=1, dtype=dtype)
        with tf.GradientTape() as tape:
            nll_T = layer(features_TD, targets_T, training=training)
        gradient = tape.gradient(nll_T, layer.kernel_VD.value)
        assert nll_T.dtype == gradient.dtype == tf.float32
        results.append((nll_T, tf.convert_to_tensor(gradient)))
        assert layer.logits(features_TD).dtype == tf.float32
    (nll_T, gradient), (mixed_T, mixed_gradient) = results
    np.testing.assert_allclose(mixed_T, nll_T, atol=0.03)
    np.testing.assert_allclose(mixed_gradient, gradient, atol=0.06)


@pytest.mark.parametrize("training", [sets.thorough(False), True])
def test_xla_computes_the_same(training):
    features_TD, kernel_VD, targets_T = random_batch(9, 4, 30)
    results = []
    for jit_compile in (False, True):
        layer = layer_with(kernel_VD, num_sampled=10, seed=7)

        @tf.function(jit_compile=jit_compile)
        def run(features_TD, layer=layer):
            with tf.GradientTape() as tape:
                tape.watch(features_TD)
                nll_T = layer(features_TD, targets_T, training=training)
            return nll_T, tape.gradient(nll_T, features_TD)

        results.append(run(tf.constant(features_TD)))
    for plain, compiled in zip(*results, strict=True):
        np.testing.assert_allclose(compiled, plain, rtol=1e-4, atol=1e-5)


def test_saved_in_a_functional_model(tmp_path):
    features = keras.Input((None, 4))
    targets = keras.Input((None,), dtype="int32")
    layer = SampledSoftmax(12, num_sampled=5, seed=3, name="softmax")
    nll = layer(features, targets)
    assert nll.shape == (None, None) and nll.dtype == "float32"
    model = keras.Model([features, targets], nll)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.get_layer("softmax").get_config() == layer.get_config()
    features_TD, _, targets_T = random_batch(6, 4, 12)
    batch = features_TD.reshape(2, 3, 4), targets_T.reshape(2, 3)
    np.testing.assert_array_equal(model(batch), loaded(batch))


@pytest.mark.parametrize("field", ["vocabulary_size", "num_sampled"])
def test_refuses_empty_sizes(field):
    with pytest.raises(
        ValueError, match=f"`{field}` must be a whole number of at least 1"
    ):
        SampledSoftmax(**{"vocabulary_size": 5, field: 0})
