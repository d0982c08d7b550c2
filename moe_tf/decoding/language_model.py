"""Sampling of text from a language model.

The loop is Python's, unlike that of `loop.decode`: the step may run on a mesh
while tokens and draws stay on the host.
"""

from collections.abc import Callable
from collections.abc import Sequence

import keras
import numpy as np
from keras import ops

from moe_tf import checks
from moe_tf import special_ids
from moe_tf.decoding.allowed_ids import forbid_ids
from moe_tf.types import Nest
from moe_tf.types import Tensor


def sample_text(
    step: Callable[[Tensor, Nest], tuple[Tensor, Nest]],
    initial_states: Nest,
    num_sequences: int,
    start_id: int,
    end_id: int,
    max_length: int,
    temperature: float = 1.0,
    seed: int = 0,
    forbidden_ids: Sequence[int] = (),
) -> list[list[int]]:
    """Draws sequences token by token.

    The draws depend on `seed` alone: no random state is kept between calls.
    Padding, id 0, is fed to a sequence that has ended while others go on.

    Example:

    >>> def step(tokens, states):  # Each id is followed by the next.
    ...     return tf.one_hot(tokens + 1, 6, 9.0, 0.0), states
    >>> moe_tf.decoding.sample_text(
    ...     step, (), num_sequences=2, start_id=2, end_id=5, max_length=8,
    ...     temperature=0.0,
    ... )
    [[3, 4, 5], [3, 4, 5]]

    Args:
        step: function of `(tokens_N, states)`, the last token of each of `N`
            sequences, int32, and the states. It returns the logits of the
            next token, float `(N, V)`, and the new states.
            `tf.function(model.step)` is fast.
        initial_states: nested tensors, states before the first token.
        num_sequences: int, `N`.
        start_id: int, the token fed first.
        end_id: int, the token after which a sequence stops.
        max_length: int, upper limit of a sequence's tokens, `end_id`
            included.
        temperature: float, divides the logits; 0 takes the likeliest token.
            Defaults to `1.0`.
        seed: int. Defaults to `0`.
        forbidden_ids: ids never to be drawn, such as padding and unknown.

    Returns:
        A list of `num_sequences` lists of ints, without `start_id`, and
        with `end_id` as the last where the sequence ended in time.

    Raises:
        ValueError: if a setting is out of its range, or all or unknown ids
            are forbidden.
    """
    checks.at_least("num_sequences", num_sequences, 1)
    checks.at_least("max_length", max_length, 1)
    checks.not_negative("temperature", temperature)
    generator = keras.random.SeedGenerator(seed)
    states = initial_states
    tokens_N = np.full(num_sequences, start_id, "int32")
    ended_N = np.zeros(num_sequences, bool)
    sequences = [[] for _ in range(num_sequences)]
    for _ in range(max_length):
        logits_NV, states = step(ops.convert_to_tensor(tokens_N), states)
        logits_NV = ops.cast(logits_NV, "float32")
        if forbidden_ids:
            logits_NV = forbid_ids(logits_NV, forbidden_ids)
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


def _choose(logits_NV, temperature, generator):
    if temperature == 0:
        return ops.argmax(logits_NV, axis=-1)
    return keras.random.categorical(
        logits_NV / temperature, 1, dtype="int32", seed=generator
    )[:, 0]
