"""Small models whose layers are named as the real ones."""

import keras
import tensorflow as tf


class Experts(keras.layers.Layer):
    """Two kernels of all experts; every expert sees every token."""

    def __init__(self, num_experts, hidden_units, **kwargs):
        super().__init__(name="experts", **kwargs)
        self.num_experts = num_experts
        self.hidden_units = hidden_units

    def build(self, input_shape):
        width = input_shape[-1]
        self.in_EDF = self.add_weight(
            shape=(self.num_experts, width, self.hidden_units),
            initializer="glorot_normal",
            name="expert_in_kernel",
        )
        self.out_EFD = self.add_weight(
            shape=(self.num_experts, self.hidden_units, width),
            initializer="orthogonal",
            name="expert_out_kernel",
        )

    def call(self, x_BLD, gate_BLE):
        in_EDF, out_EFD = (
            tf.cast(kernel, x_BLD.dtype)
            for kernel in (self.in_EDF, self.out_EFD)
        )
        h_BLEF = tf.nn.relu(tf.einsum("BLD,EDF->BLEF", x_BLD, in_EDF))
        y_BLED = tf.einsum("BLEF,EFD->BLED", h_BLEF, out_EFD)
        return tf.einsum("BLED,BLE->BLD", y_BLED, gate_BLE)


class EveryExpert(keras.layers.Layer):
    """A softmax-gated sum of all experts, with a balance loss."""

    def __init__(self, num_experts=4, hidden_units=8, **kwargs):
        super().__init__(**kwargs)
        self.num_experts = num_experts
        self.experts = Experts(num_experts, hidden_units)

    def build(self, input_shape):
        self.gate_DE = self.add_weight(
            shape=(input_shape[-1], self.num_experts), name="gate_kernel"
        )

    def call(self, x_BLD):
        gate_BLE = tf.nn.softmax(
            tf.einsum("BLD,DE->BLE", x_BLD, tf.cast(self.gate_DE, x_BLD.dtype))
        )
        importance_E = tf.reduce_mean(tf.cast(gate_BLE, "float32"), [0, 1])
        self.add_loss(0.1 * tf.reduce_sum(importance_E**2))
        return self.experts(x_BLD, gate_BLE)


def language_model(vocabulary=31, width=8, length=6, dropout=0.2, experts=4):
    """Embedding, experts, dropout, norm, softmax."""
    inputs = keras.Input((length,), dtype="int32")
    x = keras.layers.Embedding(vocabulary, width)(inputs)
    x = EveryExpert(experts, name="moe")(x)
    x = keras.layers.Dropout(dropout, seed=3)(x)
    x = keras.layers.LayerNormalization()(x)
    outputs = keras.layers.Dense(vocabulary, dtype="float32")(x)
    return keras.Model(inputs, outputs)


def build_slots(model):
    """Builds the optimizer, as the first step would.

    A step that makes variables is traced twice, which takes seconds on a mesh.
    To be called where the model is made.
    """
    model.optimizer.build(model.trainable_variables)
    return model
