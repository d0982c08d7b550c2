"""Beam search with GNMT's scores and pruning, over a step function."""

import math
import typing

import tensorflow as tf

from moe_tf import checks
from moe_tf import special_ids
from moe_tf import top_k
from moe_tf.decoding import allowed_ids
from moe_tf.decoding import back_pointers
from moe_tf.decoding import beams
from moe_tf.decoding import hypotheses


def search(
    step,
    memory,
    states,
    source_mask_BS=None,
    *,
    beam_size,
    start_id,
    end_id,
    max_length_B,
    length_penalty=0.2,
    coverage_penalty=0.2,
    pruning=3.0,
    num_best=1,
    forbidden_ids=(),
    return_attention=False,
):
    """The best translations that a beam of `beam_size` hypotheses finds.

    At every position the `beam_size` live hypotheses of a sentence offer all
    their continuations. Those that rank among the `beam_size` likeliest and
    end with `end_id` are finished; the `beam_size` likeliest of the others
    live on. A finished hypothesis has the score
    `log P(Y|X) / lp(Y) + cp(X; Y)` of `hypotheses`. A sentence is done when
    `beam_size` hypotheses have finished, when it reaches its `max_length_B`,
    or when no live hypothesis can still be among those returned; the last
    changes no result.

    At position `max_length_B` `end_id` is the only continuation, whatever the
    model thinks of it: every hypothesis ends, and its log-probability is that
    of the whole. A sentence of `max_length_B` 0 gets no hypothesis.

    Of equal values the earlier hypothesis comes first, and of one hypothesis
    the smaller id, so that results are the same every time. What a sentence
    gets depends neither on the others of the batch nor on padding, as far as
    the step's numbers do not.

    It makes a graph of one loop, with one call of `step` a position, in which
    batch and source may have any size: call it within a `tf.function`. Called
    eagerly it gives the same, slowly.

    Args:
        step: function of `(tokens_N, states, memory)`, the last token of each
            hypothesis, int32, `N = B * beam_size`, sentence by sentence. It
            returns `(logits_NV, states, attention_NS)`, the logits of the
            next token, new states of the same shapes and the attention that
            it had, or `None`. Rows that are no longer needed read padding, 0;
            what it returns for them does not matter.
        memory: nested tensors `(B, ...)`, what the step reads of the source;
            given to it with each row repeated `beam_size` times.
        states: nested tensors `(B, ...)` before the first token; repeated
            likewise, and from then on reordered with the hypotheses.
        source_mask_BS: optional bool, `False` where the source is padding;
            for the coverage penalty.
        beam_size: int, `M`.
        start_id: int, the token fed first.
        end_id: int, the token that ends a hypothesis.
        max_length_B: int `(B,)`, most tokens of each sentence, `end_id`
            counted. GNMT takes twice the length of the source.
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
            The probabilities of the others stay as the model gives them.
        return_attention: bool. Defaults to `False`.

    Returns:
        `hypotheses.Hypotheses` of `num_best` a sentence. Fewer than those
        are found where pruning leaves fewer, or where `end_id` has
        probability 0.

    Raises:
        ValueError: a setting is out of its range, or the step returns what
            it must not.
        tf.errors.InvalidArgumentError: a length is negative, or a live
            hypothesis gets logits with NaN or infinity, or all `-inf`.

    Reference:
     - [Wu et al., 2016](https://arxiv.org/abs/1609.08144), section 7
    """
    checks.at_least("beam_size", beam_size, 1)
    checks.at_least("num_best", num_best, 1)
    if num_best > beam_size:
        raise ValueError(
            "`num_best` must be at most `beam_size`. "
            f"Received: num_best={num_best}, beam_size={beam_size}"
        )
    checks.not_negative("length_penalty", length_penalty)
    checks.not_negative("coverage_penalty", coverage_penalty)
    checks.not_negative("pruning", pruning, allow_none=True)
    if coverage_penalty and source_mask_BS is None:
        raise ValueError(
            "`coverage_penalty` needs `source_mask_BS`. Received: "
            f"coverage_penalty={coverage_penalty}, source_mask_BS=None"
        )
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
    max_length_B, most = beams.most_positions(max_length_B)
    memory, states = (
        beams.repeated(tree, beam_size, tf.size(max_length_B))
        for tree in (memory, states)
    )
    checked = beams.Step(
        step, memory, states, bool(return_attention or coverage_penalty)
    )
    return _Search(settings, checked, source_mask_BS, max_length_B).run(
        states, most
    )


class _Settings(typing.NamedTuple):
    beam_size: int
    start_id: int
    end_id: int
    length_penalty: float
    coverage_penalty: float
    pruning: float
    num_best: int
    forbidden_ids: tuple
    return_attention: bool


class _Candidates(typing.NamedTuple):
    """Continuations of a sentence's hypotheses, the likeliest first."""

    value_BJ: typing.Any  # log-probability of the whole
    token_BJ: typing.Any
    slot_BJ: typing.Any  # of the hypothesis that it continues


class _Live(typing.NamedTuple):
    """Hypotheses that have not ended; `-inf` where there is none."""

    token_BM: typing.Any
    log_probability_BM: typing.Any
    coverage_BMS: typing.Any  # () where nothing needs it


class _Ended(typing.NamedTuple):
    """The best finished hypotheses, `P` of them, the best first.

    `slot_BP` is where each was in the beam before its last token. `number_B`
    counts all that finished.
    """

    score_BP: typing.Any
    log_probability_BP: typing.Any
    length_BP: typing.Any
    slot_BP: typing.Any
    number_B: typing.Any


class _Search:
    """The loop over positions; letters as in `search`, `J` candidates."""

    def __init__(self, settings, step, source_mask_BS, max_length_B):
        self._settings = settings
        self._step = step
        self._source_mask_BS = source_mask_BS
        self._max_length_B = max_length_B

    def run(self, states, most):
        live, ended = self._start()
        history = back_pointers.empty(most, self._settings.return_attention)

        def goes_on(position, live, ended, states, history):
            # The first step runs anyway, so that no array stays empty.
            return (position == 0) | tf.reduce_any(_is_live(live))

        loop = (tf.constant(0), live, ended, states, history)
        free = tf.TensorShape(None)
        shapes = (
            tf.TensorShape([]),
            beams.any_number_of_rows(live),
            beams.any_number_of_rows(ended),
            beams.any_number_of_rows(states),
            tf.nest.map_structure(lambda array: free, history),
        )
        position, _, ended, _, history = tf.while_loop(
            goes_on, self._advance, loop, shapes
        )
        return self._result(position, ended, history)

    def _start(self):
        beam_size, num_best = self._settings.beam_size, self._settings.num_best
        wanted_B1 = self._max_length_B[:, None] > 0
        first_M = tf.range(beam_size) == 0
        zero_BM = tf.zeros_like(wanted_B1 & first_M, tf.int32)
        zero_BP = tf.tile(zero_BM[:, :1], [1, num_best])
        coverage_BMS = ()
        if self._settings.coverage_penalty:
            mask_BMS = tf.repeat(self._source_mask_BS[:, None], beam_size, 1)
            coverage_BMS = tf.zeros_like(mask_BMS, tf.float32)
        live = _Live(
            zero_BM + self._settings.start_id,
            tf.where(wanted_B1 & first_M, 0.0, -math.inf),
            coverage_BMS,
        )
        none_BP = tf.fill(tf.shape(zero_BP), -math.inf)
        return live, _Ended(none_BP, none_BP, zero_BP, zero_BP, zero_BM[:, 0])

    def _advance(self, position, live, ended, states, history):
        beam_size = self._settings.beam_size
        live_BM = _is_live(live)
        token_BM = tf.where(live_BM, live.token_BM, special_ids.PAD)
        logits_NV, total_N, states, attention_NS = self._step(
            beams.joined(token_BM),
            states,
            beams.joined(live_BM),
            position,
        )
        coverage_BMS = live.coverage_BMS
        attention_BMS = None
        if attention_NS is not None:
            attention_BMS = beams.by_sentence(attention_NS, beam_size)
        if self._settings.coverage_penalty:
            coverage_BMS += attention_BMS
        found = self._candidates(logits_NV, total_N, live, position)
        ended = self._finish(ended, found, coverage_BMS, position)

        # The likeliest of those that do not end live on.
        value_BJ = tf.where(
            found.token_BJ == self._settings.end_id, -math.inf, found.value_BJ
        )
        value_BM, pick_BM = tf.math.top_k(value_BJ, beam_size)
        token_BM, slot_BM = (
            tf.gather(x_BJ, pick_BM, batch_dims=1)
            for x_BJ in (found.token_BJ, found.slot_BJ)
        )
        done_B = self._is_done(value_BM, ended, position)
        value_BM = tf.where(done_B[:, None], -math.inf, value_BM)
        if self._settings.coverage_penalty:
            coverage_BMS = tf.gather(coverage_BMS, slot_BM, batch_dims=1)
        live = _Live(token_BM, value_BM, coverage_BMS)
        first_B1 = tf.range(tf.shape(slot_BM)[0])[:, None] * beam_size
        states = beams.reordered(states, beams.joined(slot_BM + first_B1))
        history = back_pointers.append(
            history, position, token_BM, slot_BM, attention_BMS
        )
        return position + 1, live, ended, states, history

    def _candidates(self, logits_NV, total_N, live, position):
        """The `2 * beam_size` likeliest continuations, the likeliest first.

        Of each hypothesis `C`, one more than the beam is wide, are enough:
        one may end. So at least `beam_size` do not end, where there are any.
        """
        settings, size = self._settings, logits_NV.shape[1]
        allowed_V = allowed_ids.mask(
            size, settings.forbidden_ids, settings.end_id
        )
        top_NC, token_NC = top_k.wide_top_k(
            tf.where(allowed_V, logits_NV, -math.inf),
            min(settings.beam_size + 1, size),
        )
        end_NC = tf.where(
            tf.range(top_NC.shape[1]) == 0,
            logits_NV[:, settings.end_id, None],
            -math.inf,
        )
        last_N1 = tf.repeat(
            self._max_length_B <= position + 1, settings.beam_size
        )[:, None]
        top_NC = tf.where(last_N1, end_NC, top_NC) - total_N[:, None]
        token_NC = tf.where(last_N1, settings.end_id, token_NC)
        top_NC = tf.where(
            top_NC < top_NC[:, :1] - settings.pruning, -math.inf, top_NC
        )
        # A row that is not live may have any logits, NaN too.
        live_BM1 = _is_live(live)[:, :, None]
        value_BMC = tf.where(
            live_BM1,
            live.log_probability_BM[:, :, None]
            + beams.by_sentence(top_NC, settings.beam_size),
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

    def _finish(self, ended, found, coverage_BMS, position):
        """Takes the candidates that end among the best finished ones."""
        settings = self._settings
        is_best_J = tf.range(2 * settings.beam_size) < settings.beam_size
        ends_BJ = (
            (found.token_BJ == settings.end_id)
            & is_best_J
            & (found.value_BJ > -math.inf)
        )
        length_BJ = tf.where(ends_BJ, position + 1, 0)
        value_BJ = tf.where(ends_BJ, found.value_BJ, -math.inf)
        score_BJ = value_BJ / hypotheses.length_penalty(
            position + 1, settings.length_penalty
        )
        if settings.coverage_penalty:
            penalty_BM = hypotheses.coverage_penalty(
                coverage_BMS, self._source_mask_BS, settings.coverage_penalty
            )
            score_BJ += tf.gather(penalty_BM, found.slot_BJ, batch_dims=1)
        new = (score_BJ, value_BJ, length_BJ, found.slot_BJ)
        # Those that finished before come first where scores are equal.
        both = [
            tf.concat(pair, axis=1) for pair in zip(ended, new, strict=False)
        ]
        score_BP, pick_BP = tf.math.top_k(both[0], settings.num_best)
        rest = [tf.gather(x, pick_BP, batch_dims=1) for x in both[1:]]
        number_B = ended.number_B + tf.reduce_sum(
            tf.cast(ends_BJ, tf.int32), axis=1
        )
        return _Ended(score_BP, *rest, number_B)

    def _is_done(self, value_BM, ended, position):
        """Whether nothing that still lives can change a sentence's result."""
        settings = self._settings
        # Probabilities only fall and `lp` only grows, and `cp` is at most 0.
        bound_B = value_BM[:, 0] / hypotheses.length_penalty(
            self._max_length_B, settings.length_penalty
        )
        needed_B = tf.maximum(
            ended.score_BP[:, -1], ended.score_BP[:, 0] - settings.pruning
        )
        return (
            (ended.number_B >= settings.beam_size)
            | (position + 1 >= self._max_length_B)
            | (bound_B < needed_B)
        )

    def _result(self, num_positions, ended, history):
        kept_BP = ended.length_BP > 0
        kept_BP &= (
            ended.score_BP >= ended.score_BP[:, :1] - self._settings.pruning
        )
        length_BP = tf.where(kept_BP, ended.length_BP, 0)
        token_BPI, attention_BPIS = back_pointers.trace(
            history,
            num_positions,
            length_BP,
            ended.slot_BP,
            self._settings.end_id,
        )
        return hypotheses.Hypotheses(
            token_BPI,
            length_BP,
            tf.where(kept_BP, ended.score_BP, -math.inf),
            tf.where(kept_BP, ended.log_probability_BP, -math.inf),
            attention_BPIS,
        )


def _is_live(live):
    return live.log_probability_BM > -math.inf
