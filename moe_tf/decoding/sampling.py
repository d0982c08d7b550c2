"""Drawing translations token by token over a step function, and greedily."""

import math
import typing

import tensorflow as tf

from moe_tf import checks
from moe_tf import special_ids
from moe_tf.decoding import allowed_ids
from moe_tf.decoding import back_pointers
from moe_tf.decoding import beams
from moe_tf.decoding import hypotheses


def sample(
    step,
    memory,
    states,
    *,
    start_id,
    end_id,
    max_length_B,
    temperature=1.0,
    seed=0,
    num_samples=1,
    forbidden_ids=(),
    return_attention=False,
):
    """Draws `num_samples` translations of each sentence.

    The graph of one loop, as `beam_search.search`, whose arguments these are
    where the names are the same. There too `end_id` is all that may follow at
    the last position; a sentence of `max_length_B` 0 gets no hypothesis.

    What is drawn depends on `seed`, the row of the sentence (unless `seed` has
    one for each), the number of the sample and the position, and on nothing
    else of the batch.

    Args:
        temperature: float, divides the logits; 0 takes the likeliest token,
            of equal ones that of the smallest id. Defaults to `1.0`.
        seed: int, or ints `(B,)`, one for each sentence: then a sentence's
            place in the batch does not matter either. Defaults to `0`.
        num_samples: int, `M`. Defaults to `1`.

    Returns:
        `hypotheses.Hypotheses` in the order of the draws. Scores are the
        log-probabilities, which are those of the model at temperature 1.

    Raises:
        ValueError, tf.errors.InvalidArgumentError: as `beam_search.search`.
    """
    checks.not_negative("temperature", temperature)
    checks.at_least("num_samples", num_samples, 1)
    max_length_B, most = beams.most_positions(max_length_B)
    memory, states = (
        beams.repeated(tree, num_samples, tf.size(max_length_B))
        for tree in (memory, states)
    )
    checked = beams.Step(step, memory, states, return_attention)
    uniform_BIM = None
    if temperature:
        uniform_BIM = _uniform(seed, max_length_B, most, num_samples)
    settings = _Settings(
        end_id, temperature, num_samples, tuple(forbidden_ids), return_attention
    )
    run = _Sampling(settings, checked, max_length_B, uniform_BIM)
    return run(start_id, states, most)


class _Settings(typing.NamedTuple):
    end_id: int
    temperature: float
    num_samples: int
    forbidden_ids: tuple
    return_attention: bool


class _Drawn(typing.NamedTuple):
    """What has been drawn for each row, and whether it goes on."""

    token_N: typing.Any
    live_N: typing.Any
    length_N: typing.Any
    log_probability_N: typing.Any


class _Sampling:
    """The loop over positions."""

    def __init__(self, settings, step, max_length_B, uniform_BIM):
        self._settings = settings
        self._step = step
        self._max_length_N = tf.repeat(max_length_B, settings.num_samples)
        self._uniform_BIM = uniform_BIM

    def __call__(self, start_id, states, most):
        settings = self._settings
        zero_N = tf.zeros_like(self._max_length_N)
        drawn = _Drawn(
            zero_N + start_id,
            self._max_length_N > 0,
            zero_N,
            tf.zeros_like(zero_N, tf.float32),
        )
        history = back_pointers.empty(most, settings.return_attention)

        def goes_on(position, drawn, states, history):
            # The first step runs anyway, so that no array stays empty.
            return (position == 0) | tf.reduce_any(drawn.live_N)

        free = tf.TensorShape(None)
        shapes = (
            tf.TensorShape([]),
            beams.any_number_of_rows(drawn),
            beams.any_number_of_rows(states),
            tf.nest.map_structure(lambda array: free, history),
        )
        loop = (tf.constant(0), drawn, states, history)
        position, drawn, _, history = tf.while_loop(
            goes_on, self._advance, loop, shapes
        )
        length_BM, value_BM = (
            beams.by_sentence(x_N, settings.num_samples)
            for x_N in (drawn.length_N, drawn.log_probability_N)
        )
        value_BM = tf.where(length_BM > 0, value_BM, -math.inf)
        tokens_BMI, attention_BMIS = back_pointers.trace(
            history,
            position,
            length_BM,
            self._own_slot(length_BM),
            settings.end_id,
        )
        return hypotheses.Hypotheses(
            tokens_BMI, length_BM, value_BM, value_BM, attention_BMIS
        )

    def _advance(self, position, drawn, states, history):
        settings = self._settings
        live_N = drawn.live_N
        logits_NV, total_N, states, attention_NS = self._step(
            tf.where(live_N, drawn.token_N, special_ids.PAD),
            states,
            live_N,
            position,
        )
        logits_NV = tf.where(live_N[:, None], logits_NV, 0.0)
        is_last_N = position + 1 >= self._max_length_N
        token_N = self._choose(logits_NV, position, is_last_N)
        token_N = tf.where(is_last_N, settings.end_id, token_N)
        value_N = tf.gather(logits_NV, token_N, batch_dims=1) - total_N
        token_BM = beams.by_sentence(token_N, settings.num_samples)
        if attention_NS is not None:
            attention_NS = beams.by_sentence(attention_NS, settings.num_samples)
        history = back_pointers.append(
            history, position, token_BM, self._own_slot(token_BM), attention_NS
        )
        drawn = _Drawn(
            token_N,
            live_N & (token_N != settings.end_id),
            drawn.length_N + tf.cast(live_N, tf.int32),
            drawn.log_probability_N + tf.where(live_N, value_N, 0.0),
        )
        return position + 1, drawn, states, history

    def _choose(self, logits_NV, position, is_last_N):
        settings = self._settings
        allowed_V = allowed_ids.mask(
            logits_NV.shape[1], settings.forbidden_ids, settings.end_id
        )
        logits_NV = tf.where(allowed_V, logits_NV, -math.inf)
        best_N1, token_N1 = tf.math.top_k(logits_NV, 1)
        tf.debugging.Assert(
            tf.reduce_all((best_N1[:, 0] > -math.inf) | is_last_N),
            [
                "Every id that is not forbidden has probability 0. Position:",
                position,
            ],
        )
        if not settings.temperature:
            return token_N1[:, 0]
        wide_NV = tf.cast(logits_NV - best_N1, tf.float64)
        return draw(
            tf.exp(wide_NV / settings.temperature),
            tf.reshape(self._uniform_BIM[:, position], [-1]),
        )

    def _own_slot(self, x_BM):
        return tf.zeros_like(x_BM, tf.int32) + tf.range(x_BM.shape[1])


def draw(weight_NV, uniform_N):
    """An id of each row, in proportion to its weight: the inverse CDF.

    Args:
        weight_NV: float64, at least 0, some of each row above.
        uniform_N: float64 in [0, 1).

    Returns:
        int32 `(N,)`; never an id of weight 0.
    """
    sum_NV = tf.cumsum(weight_NV, axis=1)
    total_N1 = sum_NV[:, -1:]
    index_N1 = tf.searchsorted(sum_NV, uniform_N[:, None] * total_N1, "right")
    # The product may round up to the total.
    last_N1 = tf.searchsorted(sum_NV, total_N1, "left")
    return tf.minimum(index_N1, last_N1)[:, 0]


def _uniform(seed, max_length_B, num_positions, num_samples):
    """Float64 `(B, I, M)` in [0, 1), of each sentence by its own seed."""
    seed = tf.convert_to_tensor(seed)
    if seed.shape.rank not in (0, 1) or not seed.dtype.is_integer:
        raise ValueError(
            "`seed` must be a whole number, or one for each sentence. "
            f"Received: {seed.dtype.name} of shape {seed.shape}"
        )
    seed = tf.cast(seed, tf.int64)
    row_B = tf.range(tf.size(max_length_B, tf.int64))
    if seed.shape.rank == 0:
        seed_B2 = tf.stack([tf.zeros_like(row_B) + seed, row_B], axis=1)
    else:
        seed_B2 = tf.stack([seed, tf.zeros_like(row_B)], axis=1)

    # By position first: the longest of the batch then changes no draw.
    def one(seed_2):
        return tf.random.stateless_uniform(
            [num_positions, num_samples], seed_2, dtype=tf.float64
        )

    return tf.map_fn(
        one,
        seed_B2,
        fn_output_signature=tf.TensorSpec([None, num_samples], tf.float64),
    )
