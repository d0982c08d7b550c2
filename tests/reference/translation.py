"""Both translators in numpy, with the weights of a built model.

Only experts are computed by their Keras layer, which has an oracle of its own.
"""

import keras
import numpy as np

from moe_tf.layers import FeedForward
from tests.reference import attention
from tests.reference.lstm import lstm
from tests.reference.lstm import sigmoid


def norm(layer, x):
    gamma, beta = (np.asarray(weight) for weight in layer.weights)
    centred = x - x.mean(-1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    return centred / deviation * gamma + beta


def net(layer, x, mask):
    if not isinstance(layer, FeedForward):
        return np.asarray(layer(x.astype("float32"), mask=mask))
    kernel_in, kernel_out = (np.asarray(weight) for weight in layer.weights)
    return np.maximum(x @ kernel_in, 0) @ kernel_out


def positions(length, width):
    waves = np.zeros((length, width))
    for position in range(length):
        for wave in range(width // 2):
            angle = position / 10_000 ** (wave / max(width // 2 - 1, 1))
            waves[position, wave] = np.sin(angle)
            waves[position, wave + width // 2] = np.cos(angle)
    return waves


def transformer(model, inputs, heads):
    """Logits `(B, T, V)` and the last layer's weights on the source."""
    source, tokens = inputs["source"], inputs["tokens"]
    width = model.variant.width
    mask = source != 0
    table = np.asarray(model.softmax.kernel_VD)
    tables = [
        table if layer is None else np.asarray(layer.embeddings)
        for layer in (model.source_embedding, model.target_embedding)
    ]
    memory = tables[0][source] * np.sqrt(width) + positions(
        source.shape[1], width
    )
    for block in model.encoder_blocks:
        qkv, output = (np.asarray(w) for w in block.attention.weights)
        parts = np.split(norm(block.attention_norm, memory) @ qkv, 3, axis=-1)
        y, _ = attention.dot_product(*parts, heads, lambda b, t, s: mask[b, s])
        memory = memory + y @ output
        y = norm(block.feed_forward_norm, memory)
        memory = memory + net(block.feed_forward, y, mask)
    memory = norm(model.encoder_norm, memory)
    x = tables[1][tokens] * np.sqrt(width) + positions(tokens.shape[1], width)
    for block in model.decoder_blocks:
        qkv, output = (np.asarray(w) for w in block.attention.weights)
        parts = np.split(norm(block.attention_norm, x) @ qkv, 3, axis=-1)
        y, _ = attention.dot_product(*parts, heads, lambda b, t, s: s <= t)
        x = x + y @ output
        query, key_value, output = (
            np.asarray(w) for w in block.source_attention.weights
        )
        y, weights = attention.dot_product(
            norm(block.source_norm, x) @ query,
            *np.split(memory @ key_value, 2, axis=-1),
            heads,
            lambda b, t, s: mask[b, s],
        )
        x = x + y @ output
        y = norm(block.feed_forward_norm, x)
        x = x + net(block.feed_forward, y, tokens != 0)
    logits = norm(model.decoder_norm, x) @ table.T
    return logits, weights.mean(1)


def recur(layer, x, mask):
    """Row by row, so that padding has no part in it."""
    if isinstance(layer, keras.layers.RNN):
        return lstm(x, *(np.asarray(w) for w in layer.weights))[0]
    result = np.zeros_like(x)
    ways = [
        [np.asarray(w) for w in rnn.weights]
        for rnn in (layer.forward, layer.backward)
    ]
    for row, length in enumerate(mask.sum(1)):
        words = x[row : row + 1, :length]
        ahead, back = (
            lstm(words, *ways[0])[0],
            lstm(words[:, ::-1], *ways[1])[0],
        )
        both = np.concatenate([ahead, back[:, ::-1]], axis=-1)
        result[row : row + 1, :length] = both
    return result


def gnmt(model, inputs):
    """The same of a GNMT; its weights are those of the bottom layer."""
    source, tokens = inputs["source"], inputs["tokens"]

    def stack(layers, x, mask):
        for layer in layers:
            if "lstm" in layer.name:
                x = x + recur(layer, x, mask)
            else:
                x = x + sigmoid(net(layer, x, mask))
        return x

    mask = source != 0
    memory = np.asarray(model.source_embedding.embeddings)[source]
    memory = stack(model.encoder_layers, memory, mask)
    x = np.asarray(model.target_embedding.embeddings)[tokens]
    bottom = model.attention_lstm
    kernel, recurrent, projection = (
        np.asarray(w)
        for w in (bottom.kernel_IG, bottom.recurrent_PG, bottom.projection_HP)
    )
    own = [np.asarray(w) for w in bottom.attention.weights]
    y, weights = np.zeros_like(x), np.zeros((*tokens.shape, source.shape[1]))
    for b in range(len(tokens)):
        r, c = np.zeros(x.shape[-1]), np.zeros(bottom.units)
        for t in range(tokens.shape[1]):
            context, weights[b, t, mask[b]] = attention.additive(
                r, memory[b, mask[b]], *own, bottom.attention.form
            )
            z = np.concatenate([x[b, t], context]) @ kernel + r @ recurrent
            i, f, g, o = np.split(z, 4)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            r = y[b, t] = (sigmoid(o) * np.tanh(c)) @ projection
    x = stack(model.decoder_layers, x + y, tokens != 0)
    return x @ np.asarray(model.softmax.kernel_VD).T, weights
