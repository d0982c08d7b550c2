"""Writing text with a step function, whatever model is behind it.

A step function takes the last token of every sequence, int32 `(N,)`, and
states, and returns the logits of the next, float `(N, V)`, and new states.
Letters: `N` sequences, `V` vocabulary.
"""

import math

import keras
import numpy as np
from keras import ops

from moe_tf import checks
from moe_tf import special_ids
from moe_tf.decoding import allowed_ids


def sample(
    step,
    initial_states,
    num_sequences,
    start_id,
    end_id,
    max_length,
    temperature=1.0,
    seed=0,
    forbidden_ids=(),
):
    """Draws sequences token by token.

    Draws depend on `seed` alone: no state is kept between calls. A sequence
    that has ended is fed padding, id 0, until all have.

    Args:
        step: step function; `tf.function(model.step)` is the fast one.
        initial_states: states before the first token.
        num_sequences: int, `N`.
        start_id: int, the token fed first.
        end_id: int, the token after which a sequence stops.
        max_length: int, most tokens of a sequence, `end_id` included.
        temperature: float, divides the logits; 0 takes the likeliest token.
        seed: int.
        forbidden_ids: ids never to be drawn, such as padding and unknown.

    Returns:
        A list of `num_sequences` lists of ints, without `start_id`, and
        with `end_id` as the last where the sequence ended in time.

    Raises:
        ValueError: if a number is out of its range, or all or unknown ids
            are forbidden.
    """
    _check(num_sequences, max_length, temperature)
    generator = keras.random.SeedGenerator(seed)
    states = initial_states
    tokens_N = np.full(num_sequences, start_id, "int32")
    ended_N = np.zeros(num_sequences, bool)
    sequences = [[] for _ in range(num_sequences)]
    for _ in range(max_length):
        logits_NV, states = step(ops.convert_to_tensor(tokens_N), states)
        logits_NV = _forbid(ops.cast(logits_NV, "float32"), forbidden_ids)
        drawn_N = np.asarray(_choose(logits_NV, temperature, generator))
        for sequence, token, ended in zip(
            sequences, drawn_N.tolist(), ended_N, strict=True
        ):
            if not ended:
                sequence.append(token)
        ended_N |= drawn_N == end_id
        if ended_N.all():
            break
        tokens_N = np.where(ended_N, special_ids.PAD, drawn_N).astype("int32")
    return sequences


def _check(num_sequences, max_length, temperature):
    checks.at_least("num_sequences", num_sequences, 1)
    checks.at_least("max_length", max_length, 1)
    checks.not_negative("temperature", temperature)


def _choose(logits_NV, temperature, generator):
    if temperature == 0:
        return ops.argmax(logits_NV, axis=-1)
    return keras.random.categorical(
        logits_NV / temperature, 1, dtype="int32", seed=generator
    )[:, 0]


def _forbid(logits_NV, forbidden_ids):
    if not forbidden_ids:
        return logits_NV
    allowed_V = allowed_ids.mask(logits_NV.shape[-1], forbidden_ids)
    return ops.where(allowed_V, logits_NV, -math.inf)
