"""Beam search with GNMT's scores and pruning, over a step function."""

import math
import typing
from collections.abc import Sequence

import tensorflow as tf

from moe_tf import checks
from moe_tf import top_k
from moe_tf.decoding import back_pointers
from moe_tf.decoding import beams
from moe_tf.decoding import hypotheses
from moe_tf.decoding import loop
from moe_tf.decoding.allowed_ids import forbid_ids
from moe_tf.types import Nest
from moe_tf.types import Tensor


def search_beams(
    step: loop.Step,
    memory: Nest,
    states: Nest,
    source_mask_BS: Tensor | None = None,
    *,
    beam_size: int,
    start_id: int,
    end_id: int,
    max_length_B: Tensor,
    length_penalty: float = 0.2,
    coverage_penalty: float = 0.2,
    pruning: float | None = 3.0,
    num_best: int = 1,
    forbidden_ids: Sequence[int] = (),
    return_attention: bool = False,
) -> hypotheses.Hypotheses:
    """Searches for the best translations with `beam_size` hypotheses at a time.

    At every position each of a sentence's `beam_size` live hypotheses is
    continued by every token. Of all continuations, those that rank among the
    `beam_size` likeliest and end with `end_id` are finished; the `beam_size`
    likeliest of the others live on. A finished hypothesis has the score
    `log P(Y|X) / lp(Y) + cp(X; Y)`, with `hypotheses.length_penalty` and
    `hypotheses.coverage_penalty`. A sentence is done when `beam_size`
    hypotheses have finished, when it reaches its `max_length_B`, or when no
    live hypothesis can still be among those returned; the last condition
    changes no result.

    At position `max_length_B` `end_id` is the only continuation, whatever its
    probability: every hypothesis ends, and its log-probability is that of
    the whole. A sentence of `max_length_B` 0 gets no hypothesis.

    Of equal values the earlier hypothesis comes first, and of one hypothesis
    the smaller id, so results can be reproduced. The result for a sentence
    depends neither on the other sentences nor on padding, as far as the
    step's logits do not.

    Example:

    >>> def step(tokens, states, memory):  # Each id is followed by the next.
    ...     return tf.one_hot(tokens + 1, 6, 9.0, 0.0), states, None
    >>> hypotheses = moe_tf.decoding.search_beams(
    ...     step, (), (), beam_size=3, start_id=2, end_id=5, max_length_B=[8],
    ...     coverage_penalty=0.0,
    ... )
    >>> hypotheses.tokens_BMI[0, 0].numpy()
    array([3, 4, 5], dtype=int32)

    Args:
        step: function, see `loop.decode`.
        memory: nested tensors `(B, ...)`, see `loop.decode`.
        states: nested tensors `(B, ...)`, see `loop.decode`.
        source_mask_BS: optional bool, `False` where the source is padding;
            for the coverage penalty.
        beam_size: int, `M`.
        start_id: int, the token fed first.
        end_id: int, the token that ends a hypothesis.
        max_length_B: int `(B,)`, upper limit of each sentence's tokens,
            `end_id` included. GNMT takes twice the length of the source.
        length_penalty: float, GNMT's alpha; 0 does not divide. Defaults to
            `0.2`.
        coverage_penalty: float, GNMT's beta; needs attention unless 0.
            Defaults to `0.2`.
        pruning: optional float. Continuations whose log-probability is more
            than this below that of the likeliest of the same hypothesis are
            dropped, and finished hypotheses whose score is more than this
            below the sentence's best. `None` drops nothing. Defaults to
            `3.0`.
        num_best: int, hypotheses returned for each sentence, the best first.
            Defaults to `1`.
        forbidden_ids: ids never to be written, such as padding and unknown.
            Log-probabilities are still those of the model.
        return_attention: bool. Defaults to `False`.

    Returns:
        `Hypotheses`, `num_best` for each sentence. There are fewer where
        pruning leaves fewer, or where `end_id` has probability 0.

    Raises:
        ValueError: a setting is out of its range, or the step returns a value
            that `loop.decode` refuses.
        tf.errors.InvalidArgumentError: a length is negative, or a live
            hypothesis gets logits with NaN or infinity, or all `-inf`.

    Reference:
     - [Wu et al., 2016](https://arxiv.org/abs/1609.08144), section 7
    """
    checks.not_negative("pruning", pruning, allow_none=True)
    settings = _Settings(
        beam_size,
        start_id,
        end_id,
        length_penalty,
        coverage_penalty,
        math.inf if pruning is None else pruning,
        num_best,
        tuple(forbidden_ids),
        return_attention,
    )
    _check_settings(settings, source_mask_BS)
    max_length_B = loop.check_max_length(max_length_B)
    strategy = BeamSearch(settings, source_mask_BS, max_length_B)
    return loop.decode(step, memory, states, strategy)


class _Settings(typing.NamedTuple):
    beam_size: int
    start_id: int
    end_id: int
    length_penalty: float
    coverage_penalty: float
    pruning: float  # infinity for none
    num_best: int
    forbidden_ids: tuple
    return_attention: bool


def _check_settings(settings, source_mask_BS):
    checks.at_least("beam_size", settings.beam_size, 1)
    checks.at_least("num_best", settings.num_best, 1)
    if settings.num_best > settings.beam_size:
        raise ValueError(
            "`num_best` must be at most `beam_size`. Received: "
            f"num_best={settings.num_best}, beam_size={settings.beam_size}"
        )
    checks.not_negative("length_penalty", settings.length_penalty)
    checks.not_negative("coverage_penalty", settings.coverage_penalty)
    if settings.coverage_penalty and source_mask_BS is None:
        raise ValueError(
            "`coverage_penalty` needs `source_mask_BS`. Received: "
            f"coverage_penalty={settings.coverage_penalty}, "
            "source_mask_BS=None"
        )


class _Candidates(typing.NamedTuple):
    """Continuations of a sentence's hypotheses, the likeliest first."""

    value_BJ: Tensor  # log-probability of the whole
    token_BJ: Tensor
    parent_BJ: Tensor  # the hypothesis that it continues


class _Finished(typing.NamedTuple):
    """The best finished hypotheses, `P` of them, the best first.

    `parent_BP` are the back-pointers of their last tokens. `count_B` counts
    all hypotheses that have finished.
    """

    score_BP: Tensor
    log_probability_BP: Tensor
    length_BP: Tensor
    parent_BP: Tensor
    count_B: Tensor


class _State(typing.NamedTuple):
    """The live hypotheses' values and the finished hypotheses."""

    log_probability_BM: Tensor  # `-inf` where there is no hypothesis
    coverage_BMS: Tensor | tuple[()]  # `()` without a coverage penalty
    finished: _Finished


class BeamSearch(loop.DecodingStrategy):
    """Strategy that keeps the likeliest hypotheses; see `search_beams`.

    Letters are those of `search_beams`; `J` are the candidates of a sentence,
    `C` those of one hypothesis.
    """

    def __init__(
        self,
        settings: _Settings,
        source_mask_BS: Tensor | None,
        max_length_B: Tensor,
    ):
        self.num_beams = settings.beam_size
        self.max_length_B = max_length_B
        self.needs_attention = bool(settings.coverage_penalty)
        self.keeps_attention = settings.return_attention
        self._settings = settings
        self._source_mask_BS = source_mask_BS

    def initialize(self) -> loop.Beams:
        settings = self._settings
        first_M = tf.range(settings.beam_size) == 0
        live_BM = (self.max_length_B[:, None] > 0) & first_M
        zero_BM = tf.zeros_like(live_BM, tf.int32)
        zero_BP = tf.tile(zero_BM[:, :1], [1, settings.num_best])
        coverage_BMS = ()
        if settings.coverage_penalty:
            mask_BMS = tf.repeat(
                self._source_mask_BS[:, None], settings.beam_size, 1
            )
            coverage_BMS = tf.zeros_like(mask_BMS, tf.float32)
        none_BP = tf.fill(tf.shape(zero_BP), -math.inf)
        state = _State(
            tf.where(live_BM, 0.0, -math.inf),
            coverage_BMS,
            _Finished(none_BP, none_BP, zero_BP, zero_BP, zero_BM[:, 0]),
        )
        return loop.Beams(zero_BM + settings.start_id, live_BM, state)

    def step(
        self, position: Tensor, before: loop.Beams, prediction: loop.Prediction
    ) -> tuple[loop.Beams, Tensor]:
        settings = self._settings
        coverage_BMS = before.state.coverage_BMS
        if settings.coverage_penalty:
            coverage_BMS += prediction.attention_BMS
        candidates = self._candidates(position, before, prediction)
        finished = self._finish(
            before.state.finished, candidates, coverage_BMS, position
        )
        # The likeliest of those that do not end live on.
        value_BJ = tf.where(
            candidates.token_BJ == settings.end_id,
            -math.inf,
            candidates.value_BJ,
        )
        value_BM, index_BM = tf.math.top_k(value_BJ, settings.beam_size)
        token_BM, parent_BM = (
            tf.gather(x_BJ, index_BM, batch_dims=1)
            for x_BJ in (candidates.token_BJ, candidates.parent_BJ)
        )
        done_B = self._is_done(value_BM, finished, position)
        value_BM = tf.where(done_B[:, None], -math.inf, value_BM)
        if settings.coverage_penalty:
            coverage_BMS = tf.gather(coverage_BMS, parent_BM, batch_dims=1)
        state = _State(value_BM, coverage_BMS, finished)
        return loop.Beams(token_BM, value_BM > -math.inf, state), parent_BM

    def finalize(
        self, state: Nest, history: back_pointers.History, num_positions: Tensor
    ) -> hypotheses.Hypotheses:
        finished = state.finished
        returned_BP = (finished.length_BP > 0) & (
            finished.score_BP
            >= finished.score_BP[:, :1] - self._settings.pruning
        )
        length_BP = tf.where(returned_BP, finished.length_BP, 0)
        token_BPI, attention_BPIS = back_pointers.trace(
            history,
            num_positions,
            length_BP,
            finished.parent_BP,
            self._settings.end_id,
        )
        return hypotheses.Hypotheses(
            token_BPI,
            length_BP,
            tf.where(returned_BP, finished.score_BP, -math.inf),
            tf.where(returned_BP, finished.log_probability_BP, -math.inf),
            attention_BPIS,
        )

    def _candidates(self, position, before, prediction):
        """Finds the `2 * beam_size` likeliest continuations of each sentence.

        The `C = beam_size + 1` likeliest of each hypothesis are enough: one
        of them may end, so that at least `beam_size` do not end, where there
        are so many.
        """
        settings, logits_NV = self._settings, prediction.logits_NV
        top_NC, token_NC = top_k.blockwise_top_k(
            forbid_ids(logits_NV, settings.forbidden_ids, settings.end_id),
            min(settings.beam_size + 1, logits_NV.shape[1]),
        )
        end_NC = tf.where(
            tf.range(top_NC.shape[1]) == 0,
            logits_NV[:, settings.end_id, None],
            -math.inf,
        )
        last_N1 = tf.repeat(
            self.max_length_B <= position + 1, settings.beam_size
        )[:, None]
        top_NC = tf.where(last_N1, end_NC, top_NC)
        top_NC -= prediction.logsumexp_N[:, None]
        token_NC = tf.where(last_N1, settings.end_id, token_NC)
        top_NC = tf.where(
            top_NC < top_NC[:, :1] - settings.pruning, -math.inf, top_NC
        )
        # Logits of a hypothesis that is not live may be anything, NaN too.
        value_BMC = tf.where(
            before.live_BM[:, :, None],
            before.state.log_probability_BM[:, :, None]
            + beams.unflatten_beams(top_NC, settings.beam_size),
            -math.inf,
        )
        num_candidates = settings.beam_size * top_NC.shape[1]
        value_BJ, index_BJ = tf.math.top_k(
            tf.reshape(value_BMC, [-1, num_candidates]), 2 * settings.beam_size
        )
        token_BJ = tf.gather(
            tf.reshape(token_NC, [-1, num_candidates]), index_BJ, batch_dims=1
        )
        return _Candidates(value_BJ, token_BJ, index_BJ // top_NC.shape[1])

    def _finish(self, finished, candidates, coverage_BMS, position):
        """Merges the candidates that end into the best finished ones."""
        settings = self._settings
        is_best_J = tf.range(2 * settings.beam_size) < settings.beam_size
        ends_BJ = (
            (candidates.token_BJ == settings.end_id)
            & is_best_J
            & (candidates.value_BJ > -math.inf)
        )
        length_BJ = tf.where(ends_BJ, position + 1, 0)
        value_BJ = tf.where(ends_BJ, candidates.value_BJ, -math.inf)
        score_BJ = value_BJ / hypotheses.length_penalty(
            position + 1, settings.length_penalty
        )
        if settings.coverage_penalty:
            penalty_BM = hypotheses.coverage_penalty(
                coverage_BMS, self._source_mask_BS, settings.coverage_penalty
            )
            score_BJ += tf.gather(
                penalty_BM, candidates.parent_BJ, batch_dims=1
            )
        new = (score_BJ, value_BJ, length_BJ, candidates.parent_BJ)
        # Those that finished before come first where scores are equal.
        both = [
            tf.concat(pair, axis=1) for pair in zip(finished, new, strict=False)
        ]
        score_BP, index_BP = tf.math.top_k(both[0], settings.num_best)
        rest = [tf.gather(x, index_BP, batch_dims=1) for x in both[1:]]
        count_B = finished.count_B + tf.reduce_sum(
            tf.cast(ends_BJ, tf.int32), axis=1
        )
        return _Finished(score_BP, *rest, count_B)

    def _is_done(self, value_BM, finished, position):
        """Tells which sentences no live hypothesis can change, bool `(B,)`."""
        settings = self._settings
        # Probabilities only fall and `lp` only grows, and `cp` is at most 0.
        bound_B = value_BM[:, 0] / hypotheses.length_penalty(
            self.max_length_B, settings.length_penalty
        )
        needed_B = tf.maximum(
            finished.score_BP[:, -1], finished.score_BP[:, 0] - settings.pruning
        )
        return (
            (finished.count_B >= settings.beam_size)
            | (position + 1 >= self.max_length_B)
            | (bound_B < needed_B)
        )
