"""The words that each expert is chosen for: table 9 of the paper."""

import collections
import typing
from collections.abc import Sequence

import numpy as np

from moe_tf import checks
from moe_tf.types import Tensor

ORDERS = ("importance", "peakedness")


class Example(typing.NamedTuple):
    """A token that was routed to an expert, with the pieces around it.

    Attributes:
        weight: float, the gate value.
        before: pieces before the token.
        piece: the token's piece.
        after: pieces after the token.
    """

    weight: float
    before: tuple[str, ...]
    piece: str
    after: tuple[str, ...]


class ExpertWords:
    """Collects the tokens of highest gate value of each expert of a layer.

    Table 9 lists the inputs `x` of a text by decreasing `G(x)_i`, with the
    words around them. The text may be of any size and comes in parts. Only
    the `num_examples` best tokens of every expert are kept, each context
    once, and sums by language and by piece.

    Example:

    >>> words = moe_tf.evaluation.ExpertWords(num_experts=2, context=1)
    >>> words.add(
    ...     [["the", "cat", "sat"]],
    ...     weight_TK=np.array([[0.9], [0.8], [0.6]]),
    ...     expert_TK=np.array([[0], [1], [1]]),
    ... )
    >>> words.examples(1)[0]
    Example(weight=0.8, before=('the',), piece='cat', after=('sat',))

    Args:
        num_experts: int, `E`; `P * Q` of a two-level layer.
        num_examples: int, number of tokens kept for each expert. Defaults
            to `10`.
        context: int, pieces shown on each side. Defaults to `2`.

    Attributes:
        importance_E: float64, sum of each expert's gate values, equation 6.
        tokens_E: int64, number of tokens of each expert.
    """

    def __init__(
        self, num_experts: int, num_examples: int = 10, context: int = 2
    ):
        checks.at_least("num_experts", num_experts, 1)
        checks.at_least("num_examples", num_examples, 1)
        checks.at_least("context", context, 0)
        self.num_experts = num_experts
        self.num_examples = num_examples
        self.context = context
        self.importance_E = np.zeros(num_experts)
        self.tokens_E = np.zeros(num_experts, np.int64)
        self._by_language = {}
        self._by_piece = [collections.Counter() for _ in range(num_experts)]
        self._best = [{} for _ in range(num_experts)]
        # A token with a lower weight cannot be among the best.
        self._min_weight = [-np.inf] * num_experts

    def add(
        self,
        pieces: Sequence[Sequence[str]],
        weight_TK: Tensor,
        expert_TK: Tensor,
        languages: Sequence[str] | None = None,
    ) -> None:
        """Adds the gates of one call of the layer.

        Args:
            pieces: the pieces of each of `B` sequences, without padding.
            weight_TK: float, gate values of the `T = B * L` tokens, sequence
                by sequence; `L` is at least the longest sequence's length.
            expert_TK: int; `num_experts` where a token has no expert.
            languages: optional language of each sequence.

        Raises:
            ValueError: the gates do not fit the pieces.
        """
        weight_TK, expert_TK = np.asarray(weight_TK), np.asarray(expert_TK)
        self._check_gates(pieces, weight_TK, expert_TK, languages)
        if not pieces:
            return
        length = len(expert_TK) // len(pieces)
        length_B = np.array([len(sequence) for sequence in pieces])
        real_BL = np.arange(length) < length_B[:, None]
        chosen_TK = real_BL.reshape(-1, 1) & (expert_TK < self.num_experts)
        # One entry, `A`, for each assignment of a token to an expert.
        token_A, _ = np.nonzero(chosen_TK)
        expert_A, weight_A = expert_TK[chosen_TK], weight_TK[chosen_TK]
        self.tokens_E += np.bincount(expert_A, minlength=self.num_experts)
        self.importance_E += self._sums(expert_A, weight_A)
        if languages is not None:
            language_A = np.array(languages, str)[token_A // length]
            for language in sorted(set(languages)):
                own_A = language_A == language
                sums_E = self._sums(expert_A[own_A], weight_A[own_A])
                before = self._by_language.get(language, 0.0)
                self._by_language[language] = before + sums_E
        for token, expert, weight in zip(
            token_A.tolist(), expert_A.tolist(), weight_A.tolist(), strict=True
        ):
            index, position = divmod(token, length)
            sequence = pieces[index]
            self._by_piece[expert][sequence[position]] += weight
            if weight > self._min_weight[expert]:
                self._keep_example(expert, weight, sequence, position)

    def examples(self, expert: int) -> list[Example]:
        """Returns an expert's tokens of highest gate value, in that order."""
        ranked = sorted(self._best[expert].items(), key=lambda item: -item[1])
        return [
            Example(weight, *context)
            for context, weight in ranked[: self.num_examples]
        ]

    def peakedness(self) -> np.ndarray:
        """Computes how concentrated each expert is on few pieces, 0 to 1.

        Peakedness is the probability that two tokens of an expert, drawn in
        proportion to their gate values, are the same piece. It is 0 for an
        expert with fewer than `num_examples` tokens.

        Returns:
            Float64 `(E,)`.
        """
        peaked_E = np.zeros(self.num_experts)
        for expert, by_piece in enumerate(self._by_piece):
            weights = np.array(list(by_piece.values()))
            if self.tokens_E[expert] >= self.num_examples and weights.sum():
                peaked_E[expert] = np.square(weights / weights.sum()).sum()
        return peaked_E

    def choose(self, count: int, by: str = "importance") -> list[int]:
        """Returns the experts of highest `importance_E` or `peakedness()`.

        Of equal experts the first comes first. There are fewer than `count`
        if fewer experts have tokens.

        Raises:
            ValueError: `by` is neither, or `count` is below 1.
        """
        checks.at_least("count", count, 1)
        if by not in ORDERS:
            raise ValueError(
                f"`by` must be one of {', '.join(ORDERS)}. Received: by={by}"
            )
        value_E = self.importance_E
        if by == "peakedness":
            value_E = self.peakedness()
        order_E = np.argsort(-value_E, kind="stable")
        return [int(e) for e in order_E if self.tokens_E[e]][:count]

    @property
    def languages(self) -> list[str]:
        """The languages of all sequences so far, in order."""
        return sorted(self._by_language)

    def language_fractions(self) -> np.ndarray:
        """Computes the fraction of an expert's gate values by language.

        Returns:
            Float64 `(E + 1, languages)`, in the order of `languages`; the last
            row is for all experts together. Rows sum to 1; the rows of
            experts without tokens are 0.
        """
        if not self._by_language:
            return np.zeros((self.num_experts + 1, 0))
        sums = np.stack([self._by_language[name] for name in self.languages], 1)
        sums = np.concatenate([sums, sums.sum(axis=0, keepdims=True)])
        totals = sums.sum(axis=1, keepdims=True)
        return np.divide(sums, totals, np.zeros_like(sums), where=totals > 0)

    def _sums(self, expert_A, weight_A):
        return np.bincount(expert_A, weight_A, minlength=self.num_experts)

    def _keep_example(self, expert, weight, sequence, position):
        best, size = self._best[expert], self.num_examples
        context = (
            tuple(sequence[max(position - self.context, 0) : position]),
            sequence[position],
            tuple(sequence[position + 1 : position + 1 + self.context]),
        )
        best[context] = max(weight, best.get(context, -np.inf))
        if len(best) >= 4 * size:  # now and then, not for every token
            ranked = sorted(best.items(), key=lambda item: -item[1])[:size]
            self._best[expert] = dict(ranked)
            self._min_weight[expert] = ranked[-1][1]

    def _check_gates(self, pieces, weight_TK, expert_TK, languages):
        if expert_TK.ndim != 2 or weight_TK.shape != expert_TK.shape:
            raise ValueError(
                "`weight_TK` and `expert_TK` must have the same shape (T, K). "
                f"Received: {weight_TK.shape} and {expert_TK.shape}"
            )
        num_sequences = len(pieces)
        longest = max((len(sequence) for sequence in pieces), default=0)
        num_tokens = len(expert_TK)
        if (
            num_tokens % max(num_sequences, 1)
            or num_tokens < num_sequences * longest
        ):
            raise ValueError(
                "The gates must be those of equally many positions of each of "
                f"the {num_sequences} sequences of `pieces`, at least "
                f"{longest}. Received: {num_tokens} tokens"
            )
        if expert_TK.size and not (
            0 <= expert_TK.min() <= expert_TK.max() <= self.num_experts
        ):
            raise ValueError(
                f"`expert_TK` must be between 0 and {self.num_experts}, the "
                "number of experts. Received: "
                f"{expert_TK.min()} to {expert_TK.max()}"
            )
        if languages is not None and len(languages) != num_sequences:
            raise ValueError(
                "`languages` must have one for each sequence of `pieces`. "
                f"Received: {len(languages)} for {num_sequences}"
            )
