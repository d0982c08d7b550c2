"""The decoding loop: one graph loop over positions, for any strategy.

`decode` calls the model's step at every position and asks a
`DecodingStrategy` which tokens follow. `beam_search` and `sampling` are the
strategies.
"""

import abc
import typing
from collections.abc import Callable

import tensorflow as tf

from moe_tf import special_ids
from moe_tf.decoding import back_pointers
from moe_tf.decoding import beams
from moe_tf.decoding.hypotheses import Hypotheses
from moe_tf.types import Nest
from moe_tf.types import Tensor

# `(tokens_N, states, memory)` to `(logits_NV, states, attention_NS)`.
Step = Callable[[Tensor, Nest, Nest], tuple[Tensor, Nest, Tensor | None]]


class Beams(typing.NamedTuple):
    """The `M` hypotheses of each of `B` sentences at one position.

    Attributes:
        token_BM: int32, the last token of each.
        live_BM: bool, whether another token follows. What a hypothesis that
            is not live holds does not matter.
        state: nested tensors `(B, ...)` of the strategy's own.
    """

    token_BM: Tensor
    live_BM: Tensor
    state: Nest


class Prediction(typing.NamedTuple):
    """Output of the model's step at one position.

    Attributes:
        logits_NV: float32.
        logsumexp_N: float32, of the logits; log-probabilities are
            `logits_NV - logsumexp_N`.
        attention_BMS: float32; `None` if the strategy needs none.
    """

    logits_NV: Tensor
    logsumexp_N: Tensor
    attention_BMS: Tensor | None


class DecodingStrategy(abc.ABC):
    """Interface of the ways to choose the next tokens.

    `decode` calls `initialize` once, `step` at each position as long as a
    hypothesis is live, and `finalize` once.

    Attributes:
        num_beams: int, `M`, hypotheses of each sentence.
        max_length_B: int32, upper limit of each sentence's tokens. A strategy
            ends every hypothesis in time.
        needs_attention: bool, whether `step` reads the attention.
        keeps_attention: bool, whether `finalize` returns the attention.
    """

    num_beams: int
    max_length_B: Tensor
    needs_attention = False
    keeps_attention = False

    @abc.abstractmethod
    def initialize(self) -> Beams:
        """Returns the beams before the first position."""

    @abc.abstractmethod
    def step(
        self, position: Tensor, before: Beams, prediction: Prediction
    ) -> tuple[Beams, Tensor | None]:
        """Chooses the tokens of one position.

        Args:
            position: int32 scalar, from 0 on.
            before: `Beams` of the position before.
            prediction: `Prediction` of the token after each of them.

        Returns:
            The new `Beams`, and int32 back-pointers `(B, M)`: which
            hypothesis of the position before each one continues. `None` if
            each continues itself.
        """

    @abc.abstractmethod
    def finalize(
        self, state: Nest, history: back_pointers.History, num_positions: Tensor
    ) -> Hypotheses:
        """Returns the result, from the last state and the history.

        Args:
            state: nested tensors, the state of the last `Beams`.
            history: `back_pointers.History` of all positions.
            num_positions: int32 scalar, at least 1.
        """


def decode(
    step: Step, memory: Nest, states: Nest, strategy: DecodingStrategy
) -> Hypotheses:
    """Decodes with a strategy.

    Call `decode` within a `tf.function`. The graph has one loop, with one
    call of `step` a position; batch and source may have any size. An eager
    call gives the same, slowly.

    Args:
        step: function of `(tokens_N, states, memory)`, the last token of each
            hypothesis, int32, `N = B * M`, sentence by sentence. It returns
            `(logits_NV, states, attention_NS)`, the logits of the next token,
            new states of the same shapes and the attention to the source, or
            `None`. Hypotheses that are not live read padding, 0; what `step`
            returns for them does not matter.
        memory: nested tensors `(B, ...)`, the encoded source; `step` gets
            each row `M` times.
        states: nested tensors `(B, ...)` before the first token; repeated
            likewise, and from then on reordered with the hypotheses.
        strategy: `DecodingStrategy`.

    Raises:
        ValueError: the step returns no attention where it is needed, or
            logits or states of other shapes.
        tf.errors.InvalidArgumentError: a live hypothesis gets logits with NaN
            or infinity, or all `-inf`.
    """
    max_length_B, num_beams = strategy.max_length_B, strategy.num_beams
    memory, states = (
        beams.tile_beams(tree, num_beams, tf.size(max_length_B))
        for tree in (memory, states)
    )
    predict = _CheckedStep(step, memory, states, strategy)
    # Arrays have a position even where there is no sentence.
    longest = tf.reduce_max(tf.concat([[1], max_length_B], axis=0))
    history = back_pointers.empty(longest, strategy.keeps_attention)

    def goes_on(position, hypotheses, states, history):
        # The first step runs anyway, so that no array stays empty.
        return (position == 0) | tf.reduce_any(hypotheses.live_BM)

    def advance(position, hypotheses, states, history):
        prediction, states = predict(position, hypotheses, states)
        after, parent_BM = strategy.step(position, hypotheses, prediction)
        if parent_BM is None:
            parent_BM = own_beams(after.token_BM)
        else:
            states = beams.reorder_beams(states, parent_BM)
        history = back_pointers.append(
            history,
            position,
            after.token_BM,
            parent_BM,
            prediction.attention_BMS,
        )
        return position + 1, after, states, history

    start = (tf.constant(0), strategy.initialize(), states, history)
    shapes = (
        tf.TensorShape([]),
        *(beams.batch_free_shapes(tree) for tree in start[1:3]),
        tf.nest.map_structure(lambda array: tf.TensorShape(None), history),
    )
    num_positions, hypotheses, _, history = tf.while_loop(
        goes_on, advance, start, shapes
    )
    return strategy.finalize(hypotheses.state, history, num_positions)


def check_max_length(max_length_B: Tensor) -> Tensor:
    """Returns `max_length_B` as int32 `(B,)`.

    Raises:
        ValueError: it does not hold one whole number for each sentence.
        tf.errors.InvalidArgumentError: one of them is negative.
    """
    max_length_B = tf.convert_to_tensor(max_length_B)
    if max_length_B.shape.rank != 1 or not max_length_B.dtype.is_integer:
        raise ValueError(
            "`max_length_B` must be whole numbers, one a sentence. Received: "
            f"{max_length_B.dtype.name} of shape {max_length_B.shape}"
        )
    max_length_B = tf.cast(max_length_B, tf.int32)
    tf.debugging.Assert(
        tf.reduce_all(max_length_B >= 0),
        ["`max_length_B` must not be negative. Received:", max_length_B],
    )
    return max_length_B


def own_beams(x_BM: Tensor) -> Tensor:
    """Returns back-pointers of each hypothesis to itself, int32 `(B, M)`."""
    return tf.zeros_like(x_BM, tf.int32) + tf.range(x_BM.shape[1])


class _CheckedStep:
    """A model's step function whose results are checked."""

    def __init__(self, step, memory, states, strategy):
        self._step = step
        self._memory = memory
        self._shapes = beams.batch_free_shapes(states)
        self._num_beams = strategy.num_beams
        self._needs_attention = (
            strategy.needs_attention or strategy.keeps_attention
        )

    def __call__(self, position, hypotheses, states):
        """Returns a `Prediction` and the new states."""
        live_BM = hypotheses.live_BM
        token_BM = tf.where(live_BM, hypotheses.token_BM, special_ids.PAD)
        logits_NV, states, attention_NS = self._step(
            beams.flatten_beams(token_BM), states, self._memory
        )
        logits_NV = tf.cast(logits_NV, tf.float32)
        if logits_NV.shape.rank != 2 or (logits_NV.shape[1] or 0) < 2:
            raise ValueError(
                "The step's logits must be (N, V) with a known V of 2 or "
                f"more. Received: shape {logits_NV.shape}"
            )
        logsumexp_N = tf.reduce_logsumexp(logits_NV, axis=-1)
        # Logits of hypotheses that are not live may be anything.
        fine_N = tf.math.is_finite(logsumexp_N) | ~beams.flatten_beams(live_BM)
        tf.debugging.Assert(
            tf.reduce_all(fine_N),
            [
                "The step's logits hold NaN or infinity, or are all -inf. "
                "Position and rows:",
                position,
                tf.where(~fine_N)[:, 0],
            ],
        )
        states = tf.nest.map_structure(
            lambda shape, leaf: tf.ensure_shape(leaf, shape),
            self._shapes,
            states,
        )
        attention_BMS = self._attention(attention_NS)
        return Prediction(logits_NV, logsumexp_N, attention_BMS), states

    def _attention(self, attention_NS):
        if not self._needs_attention:
            return None
        if attention_NS is None:
            raise ValueError(
                "`coverage_penalty` and `return_attention` need a step that "
                "returns attention. Received: None from the step; pass "
                "coverage_penalty=0.0, return_attention=False"
            )
        attention_NS = tf.cast(attention_NS, tf.float32)
        return beams.unflatten_beams(attention_NS, self._num_beams)
