import keras
import numpy as np
import pytest
import tensorflow as tf

from moe_tf.layers.recurrent.projected_lstm import ProjectedLSTMCell
from tests import keras_contract
from tests.reference.lstm import lstm


class ProjectedLSTMCellTest(keras_contract.TestCase):
    def test_contract_inside_an_rnn(self):
        self.run_layer_test(
            keras.layers.RNN,
            init_kwargs={
                "cell": ProjectedLSTMCell(6, 4),
                "return_sequences": True,
            },
            input_shape=(2, 3, 5),
            expected_output_shape=(2, 3, 4),
            expected_num_trainable_weights=3,
            supports_masking=True,
            custom_objects={"ProjectedLSTMCell": ProjectedLSTMCell},
        )


def random_inputs(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


@pytest.mark.parametrize("units,width", [(7, 3), (3, 7), (1, 1)])
def test_matches_a_numpy_loop(units, width):
    inputs = random_inputs(2, 6, 5)
    cell = ProjectedLSTMCell(units, width)
    layer = keras.layers.RNN(cell, return_sequences=True, return_state=True)
    got, r, c = layer(inputs)
    weights = [np.asarray(w) for w in cell.weights]
    want, want_r, want_c = lstm(inputs, *weights)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(r, want_r, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(c, want_c, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("unroll", [False, True])
def test_xla_gives_the_same(unroll):
    inputs = random_inputs(2, 6, 5)
    cell = ProjectedLSTMCell(7, 3)
    layer = keras.layers.RNN(cell, return_sequences=True, unroll=unroll)
    want = layer(inputs)
    compiled = tf.function(layer, jit_compile=True)
    np.testing.assert_allclose(compiled(inputs), want, rtol=1e-5, atol=1e-6)


def test_number_of_weights():
    cell = ProjectedLSTMCell(8, 3)
    cell.build((None, 5))
    assert cell.count_params() == (5 + 3) * 4 * 8 + 8 * 3


def test_identity_projection_gives_the_lstm_of_keras():
    inputs = random_inputs(2, 6, 5)
    cell = ProjectedLSTMCell(4, 4)
    plain = keras.layers.LSTM(4, use_bias=False, return_sequences=True)
    want = plain(inputs)
    cell.build((None, 5))
    cell.set_weights([*plain.get_weights(), np.eye(4)])
    got = keras.layers.RNN(cell, return_sequences=True)(inputs)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_serialised_cell_computes_the_same():
    cell = ProjectedLSTMCell(4, 3, name="cell")
    config = keras.saving.serialize_keras_object(cell)
    copy = keras.saving.deserialize_keras_object(config)
    cell.build((None, 5))
    copy.build((None, 5))
    copy.set_weights(cell.get_weights())
    inputs = random_inputs(2, 5)
    states = cell.get_initial_state(batch_size=2)
    np.testing.assert_array_equal(
        cell(inputs, states)[0], copy(inputs, states)[0]
    )


def test_states_are_in_the_compute_dtype():
    cell = ProjectedLSTMCell(4, 3, dtype="mixed_bfloat16")
    output, states = cell(
        random_inputs(2, 5), cell.get_initial_state(batch_size=2)
    )
    assert {t.dtype.name for t in (output, *states)} == {"bfloat16"}


@pytest.mark.parametrize(
    "sizes,field", [((0, 3), "units"), ((3, 0), "projection_units")]
)
def test_refuses_empty_sizes(sizes, field):
    with pytest.raises(
        ValueError, match=f"`{field}` must be a whole number of at least 1"
    ):
        ProjectedLSTMCell(*sizes)
