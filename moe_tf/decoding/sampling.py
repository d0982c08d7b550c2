"""Sampling of translations token by token, and greedy decoding."""

import math
import typing
from collections.abc import Sequence

import tensorflow as tf

from moe_tf import checks
from moe_tf.decoding import back_pointers
from moe_tf.decoding import beams
from moe_tf.decoding import loop
from moe_tf.decoding.allowed_ids import forbid_ids
from moe_tf.decoding.hypotheses import Hypotheses
from moe_tf.types import Nest
from moe_tf.types import Tensor


def sample_hypotheses(
    step: loop.Step,
    memory: Nest,
    states: Nest,
    *,
    start_id: int,
    end_id: int,
    max_length_B: Tensor,
    temperature: float = 1.0,
    seed: int | Tensor = 0,
    num_samples: int = 1,
    forbidden_ids: Sequence[int] = (),
    return_attention: bool = False,
) -> Hypotheses:
    """Draws `num_samples` translations of each sentence.

    At the last position, `max_length_B`, `end_id` is the only token allowed. A
    sentence of `max_length_B` 0 gets no hypothesis.

    The draws of a sentence depend on `seed`, its row in the batch (unless
    `seed` has an entry for each row), the number of the sample and the
    position. They do not depend on the other sentences.

    Example:

    >>> def step(tokens, states, memory):  # Each id is followed by the next.
    ...     return tf.one_hot(tokens + 1, 6, 9.0, 0.0), states, None
    >>> hypotheses = moe_tf.decoding.sample_hypotheses(
    ...     step, (), (), start_id=2, end_id=5, max_length_B=[8],
    ...     temperature=0.0,
    ... )
    >>> hypotheses.tokens_BMI[0, 0].numpy()
    array([3, 4, 5], dtype=int32)

    Args:
        step: function, see `loop.decode`.
        memory: nested tensors `(B, ...)`, see `loop.decode`.
        states: nested tensors `(B, ...)`, see `loop.decode`.
        start_id: int, the token fed first.
        end_id: int, the token that ends a hypothesis.
        max_length_B: int `(B,)`, upper limit of each sentence's tokens,
            `end_id` included.
        temperature: float, divides the logits; 0 takes the likeliest token,
            of equal ones that of the smallest id. Defaults to `1.0`.
        seed: int, or ints `(B,)`, one for each sentence: then the draws do not
            depend on the sentence's row either. Defaults to `0`.
        num_samples: int, `M`. Defaults to `1`.
        forbidden_ids: ids never to be written, such as padding and unknown.
            Log-probabilities are still those of the model.
        return_attention: bool. Defaults to `False`.

    Returns:
        `Hypotheses` in the order of the draws. Scores are the
        log-probabilities, which are those of the model at temperature 1.

    Raises:
        ValueError: a setting is out of its range, or the step returns a value
            that `loop.decode` refuses.
        tf.errors.InvalidArgumentError: a length is negative, all allowed ids
            have probability 0, or a live hypothesis gets logits with NaN or
            infinity, or all `-inf`.
    """
    checks.not_negative("temperature", temperature)
    checks.at_least("num_samples", num_samples, 1)
    max_length_B = loop.check_max_length(max_length_B)
    settings = _Settings(
        start_id,
        end_id,
        temperature,
        seed,
        num_samples,
        tuple(forbidden_ids),
        return_attention,
    )
    strategy = Sampling(settings, max_length_B)
    return loop.decode(step, memory, states, strategy)


class _Settings(typing.NamedTuple):
    start_id: int
    end_id: int
    temperature: float
    seed: int | Tensor
    num_samples: int
    forbidden_ids: tuple
    return_attention: bool


class _State(typing.NamedTuple):
    """Lengths and log-probabilities of the samples so far."""

    length_BM: Tensor
    log_probability_BM: Tensor


class Sampling(loop.DecodingStrategy):
    """Strategy that draws each token; see `sample_hypotheses`."""

    def __init__(self, settings: _Settings, max_length_B: Tensor):
        self.num_beams = settings.num_samples
        self.max_length_B = max_length_B
        self.keeps_attention = settings.return_attention
        self._settings = settings
        self._uniform_BIM = None
        if settings.temperature:
            self._uniform_BIM = _draw_uniform(
                settings.seed, max_length_B, settings.num_samples
            )

    def initialize(self) -> loop.Beams:
        zero_BM = tf.tile(
            tf.zeros_like(self.max_length_B)[:, None], [1, self.num_beams]
        )
        return loop.Beams(
            zero_BM + self._settings.start_id,
            zero_BM < self.max_length_B[:, None],
            _State(zero_BM, tf.zeros_like(zero_BM, tf.float32)),
        )

    def step(
        self, position: Tensor, before: loop.Beams, prediction: loop.Prediction
    ) -> tuple[loop.Beams, None]:
        live_BM, state = before.live_BM, before.state
        live_N = beams.flatten_beams(live_BM)
        is_last_N = tf.repeat(position + 1 >= self.max_length_B, self.num_beams)
        logits_NV = tf.where(live_N[:, None], prediction.logits_NV, 0.0)
        token_N = self._choose(logits_NV, position, is_last_N)
        token_N = tf.where(is_last_N, self._settings.end_id, token_N)
        value_N = tf.gather(logits_NV, token_N, batch_dims=1)
        token_BM, value_BM = (
            beams.unflatten_beams(x_N, self.num_beams)
            for x_N in (token_N, value_N - prediction.logsumexp_N)
        )
        state = _State(
            state.length_BM + tf.cast(live_BM, tf.int32),
            state.log_probability_BM + tf.where(live_BM, value_BM, 0.0),
        )
        live_BM &= token_BM != self._settings.end_id
        return loop.Beams(token_BM, live_BM, state), None

    def finalize(
        self, state: Nest, history: back_pointers.History, num_positions: Tensor
    ) -> Hypotheses:
        length_BM = state.length_BM
        value_BM = tf.where(length_BM > 0, state.log_probability_BM, -math.inf)
        tokens_BMI, attention_BMIS = back_pointers.trace(
            history,
            num_positions,
            length_BM,
            loop.own_beams(length_BM),
            self._settings.end_id,
        )
        return Hypotheses(
            tokens_BMI, length_BM, value_BM, value_BM, attention_BMIS
        )

    def _choose(self, logits_NV, position, is_last_N):
        """Draws a token for each row, int32 `(N,)`."""
        settings = self._settings
        logits_NV = forbid_ids(
            logits_NV, settings.forbidden_ids, settings.end_id
        )
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
        difference_NV = tf.cast(logits_NV - best_N1, tf.float64)
        return draw_ids(
            tf.exp(difference_NV / settings.temperature),
            tf.reshape(self._uniform_BIM[:, position], [-1]),
        )


def draw_ids(weight_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """Draws an id of each row in proportion to its weight, by inverse CDF.

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


def _draw_uniform(seed, max_length_B, num_samples):
    """Draws float64 `(B, I, M)` in [0, 1), each sentence by its own seed."""
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
    num_positions = tf.reduce_max(tf.concat([[1], max_length_B], axis=0))

    # By position first: the longest of the batch then changes no draw.
    def draw_sentence(seed_2):
        return tf.random.stateless_uniform(
            [num_positions, num_samples], seed_2, dtype=tf.float64
        )

    return tf.map_fn(
        draw_sentence,
        seed_B2,
        fn_output_signature=tf.TensorSpec([None, num_samples], tf.float64),
    )
