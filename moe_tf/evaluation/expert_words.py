"""Which words an expert is for: table 9 of the paper."""

import collections
import typing
from collections.abc import Sequence

import numpy as np

from moe_tf import checks

ORDERS = ("importance", "peakedness")


class Example(typing.NamedTuple):
    """A token that was routed to an expert, and the pieces around it."""

    weight: float
    before: tuple[str, ...]
    piece: str
    after: tuple[str, ...]


class ExpertWords:
    """Collects, for each expert of a layer, its tokens of highest gate value.

    Table 9: the inputs `x` of a text by decreasing `G(x)_i`, with the words
    around them. The text may be of any size and comes in parts; what is kept
    are the `num_examples` best of every expert, each context once, and sums
    by language and piece.

    Args:
        num_experts: int, `E`; of a two-level layer all `P * Q`.
        num_examples: int, how many tokens of each expert are kept. Defaults
            to `10`.
        context: int, pieces shown on each side. Defaults to `2`.

    Attributes:
        importance_E: float64, sum of each expert's gate values, equation 6.
        tokens_E: int64, how many tokens each expert got.
    """

    def __init__(self, num_experts, num_examples=10, context=2):
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
        # Below this a token cannot be among the best any more.
        self._least = [-np.inf] * num_experts

    def add(
        self,
        pieces: Sequence[Sequence[str]],
        weight_TK,
        expert_TK,
        languages: Sequence[str] | None = None,
    ) -> None:
        """Takes the gates of one call of the layer.

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
        self._check(pieces, weight_TK, expert_TK, languages)
        if not pieces:
            return
        length = len(expert_TK) // len(pieces)
        length_B = np.array([len(sequence) for sequence in pieces])
        real_BL = np.arange(length) < length_B[:, None]
        chosen_TK = real_BL.reshape(-1, 1) & (expert_TK < self.num_experts)
        # One entry for each token and expert of it.
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
            row, column = divmod(token, length)
            self._by_piece[expert][pieces[row][column]] += weight
            if weight > self._least[expert]:
                self._keep(expert, weight, pieces[row], column)

    def examples(self, expert: int) -> list[Example]:
        """Its tokens of highest gate value, the highest first."""
        ranked = sorted(self._best[expert].items(), key=lambda item: -item[1])
        return [
            Example(weight, *context)
            for context, weight in ranked[: self.num_examples]
        ]

    def peakedness(self):
        """Float64 `(E,)`: how few pieces an expert serves, 0 to 1.

        The chance that two tokens of an expert, drawn in proportion to their
        gate values, are the same piece. 0 for an expert with fewer than
        `num_examples` tokens, of which little is known.
        """
        peaked_E = np.zeros(self.num_experts)
        for expert, by_piece in enumerate(self._by_piece):
            weights = np.array(list(by_piece.values()))
            if self.tokens_E[expert] >= self.num_examples and weights.sum():
                peaked_E[expert] = np.square(weights / weights.sum()).sum()
        return peaked_E

    def choose(self, number: int, by: str = "importance") -> list[int]:
        """The experts of the highest `importance_E` or `peakedness()`.

        Of equal ones the first; fewer than `number` if fewer have tokens.

        Raises:
            ValueError: `by` is neither, or `number` is below 1.
        """
        checks.at_least("number", number, 1)
        if by not in ORDERS:
            raise ValueError(
                f"`by` must be one of {', '.join(ORDERS)}. Received: by={by}"
            )
        value_E = self.importance_E
        if by == "peakedness":
            value_E = self.peakedness()
        order_E = np.argsort(-value_E, kind="stable")
        return [int(e) for e in order_E if self.tokens_E[e]][:number]

    @property
    def languages(self) -> list[str]:
        return sorted(self._by_language)

    def language_shares(self):
        """What part of an expert's gate values each language has.

        Returns:
            Float64 `(E + 1, languages)`, in the order of `languages`; the last
            row is that of all experts together. Rows sum to 1; those of
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

    def _keep(self, expert, weight, sequence, column):
        best, size = self._best[expert], self.num_examples
        context = (
            tuple(sequence[max(column - self.context, 0) : column]),
            sequence[column],
            tuple(sequence[column + 1 : column + 1 + self.context]),
        )
        best[context] = max(weight, best.get(context, -np.inf))
        if len(best) >= 4 * size:  # now and then, not for every token
            ranked = sorted(best.items(), key=lambda item: -item[1])[:size]
            self._best[expert] = dict(ranked)
            self._least[expert] = ranked[-1][1]

    def _check(self, pieces, weight_TK, expert_TK, languages):
        if expert_TK.ndim != 2 or weight_TK.shape != expert_TK.shape:
            raise ValueError(
                "`weight_TK` and `expert_TK` must have the same shape (T, K). "
                f"Received: {weight_TK.shape} and {expert_TK.shape}"
            )
        number = len(pieces)
        longest = max((len(sequence) for sequence in pieces), default=0)
        num_tokens = len(expert_TK)
        if num_tokens % max(number, 1) or num_tokens < number * longest:
            raise ValueError(
                "The gates must be those of equally many positions of each of "
                f"the {number} sequences of `pieces`, at least {longest}. "
                f"Received: {num_tokens} tokens"
            )
        if expert_TK.size and not (
            0 <= expert_TK.min() <= expert_TK.max() <= self.num_experts
        ):
            raise ValueError(
                f"`expert_TK` must be between 0 and {self.num_experts}, the "
                "number of experts. Received: "
                f"{expert_TK.min()} to {expert_TK.max()}"
            )
        if languages is not None and len(languages) != number:
            raise ValueError(
                "`languages` must have one for each sequence of `pieces`. "
                f"Received: {len(languages)} for {number}"
            )
