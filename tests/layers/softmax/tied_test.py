import numpy as np
import pytest
import tensorflow as tf

from moe_tf.layers.softmax import full
from moe_tf.layers.softmax.tied import WordSoftmax
from tests import keras_contract

B, L, V, D = 3, 4, 11, 5


class WordSoftmaxTest(keras_contract.TestCase):
    def test_contract(self):
        self.run_layer_test(
            WordSoftmax,
            init_kwargs={"vocabulary_size": V},
            input_shape=(B, L, D),
            expected_output_shape=(B, L, V),
            expected_num_trainable_weights=1,
            run_mixed_precision_check=False,  # logits are float32
        )


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def targets():
    return np.random.default_rng(1).integers(0, V, (B, L))


def make(dtype):
    layer = WordSoftmax(V, dtype=dtype)
    layer.build((None, D))
    layer.kernel_VD.assign(draw(V, D, seed=2))
    return layer


@pytest.fixture(params=[0, 2**20])
def kept_bytes(request, monkeypatch):
    """Both ways to the losses, whatever their size."""
    monkeypatch.setattr(full, "MAX_SAVED_BYTES", request.param)


@pytest.mark.usefixtures("kept_bytes")
@pytest.mark.parametrize(
    "dtype,tolerance", [("float64", 1e-10), ("mixed_bfloat16", 0.05)]
)
def test_losses_match_numpy(dtype, tolerance):
    layer, x_BLD = make(dtype), draw(B, L, D)
    nll, uniform = layer.losses_per_word(x_BLD, targets())
    logits = x_BLD @ draw(V, D, seed=2).T
    want = np.log(np.exp(logits).sum(-1, keepdims=True)) - logits
    own = np.take_along_axis(want, targets()[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(nll, own, atol=tolerance)
    np.testing.assert_allclose(uniform, want.mean(-1), atol=tolerance)
    assert nll.dtype == uniform.dtype
    assert nll.dtype == ("float64" if dtype == "float64" else "float32")
    got = layer.logits(x_BLD)
    np.testing.assert_allclose(got, logits, atol=tolerance)
    assert got.dtype == nll.dtype


@pytest.mark.usefixtures("kept_bytes")
def test_gradients_of_both_losses_are_those_of_whole_logits():
    layer, x_BLD = make("float64"), tf.Variable(draw(B, L, D))
    upstreams = draw(2, B, L, seed=3)
    variables = [x_BLD, layer.kernel_VD.value]

    def whole():
        logits = layer.logits(tf.convert_to_tensor(x_BLD))
        all_nll = tf.reduce_logsumexp(logits, -1, keepdims=True) - logits
        own = tf.gather(all_nll, targets(), axis=-1, batch_dims=2)
        return own, tf.reduce_mean(all_nll, axis=-1)

    results = []
    for function in (
        whole,
        lambda: layer.losses_per_word(tf.convert_to_tensor(x_BLD), targets()),
    ):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.stack(function()) * upstreams)
        results.append(tape.gradient(loss, variables))
    for want, got in zip(*results, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-10)


def test_embeds_rows_of_its_table():
    layer = make("mixed_bfloat16")
    got = layer.embed(targets())
    assert got.dtype == tf.bfloat16
    want = draw(V, D, seed=2)[targets()]
    np.testing.assert_allclose(tf.cast(got, "float32"), want, rtol=1e-2)


def test_a_vocabulary_of_nothing_is_refused():
    with pytest.raises(ValueError, match="vocabulary_size=0"):
        WordSoftmax(0)


@pytest.mark.usefixtures("kept_bytes")
def test_sizes_that_a_program_does_not_know_change_nothing():
    layer = make("float32")
    x_BLD, targets_BL = tf.constant(draw(B, L, D), tf.float32), targets()

    def losses_and_gradient(x_BLD, targets_BL):
        with tf.GradientTape() as tape:
            tape.watch(x_BLD)
            nll_BL, uniform_BL = layer.losses_per_word(x_BLD, targets_BL)
            total = tf.reduce_sum(nll_BL**2 + 0.1 * uniform_BL)
        sources = [x_BLD, layer.kernel_VD.value]
        return nll_BL, uniform_BL, *tape.gradient(total, sources)

    dynamic = tf.function(
        losses_and_gradient,
        input_signature=[
            tf.TensorSpec((None, None, D), tf.float32),
            tf.TensorSpec((None, None), tf.int64),
        ],
    )
    want = losses_and_gradient(x_BLD, tf.constant(targets_BL))
    got = dynamic(x_BLD, targets_BL)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(
            tf.convert_to_tensor(one),
            tf.convert_to_tensor(other),
            rtol=1e-5,
            atol=1e-6,
        )
