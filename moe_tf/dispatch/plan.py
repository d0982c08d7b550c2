"""The dispatch contract: tokens to the slots of experts, and answers back."""

import abc
import dataclasses
import math
from collections.abc import Callable
from collections.abc import Sequence

import tensorflow as tf
from keras import ops

from moe_tf.types import Tensor

# Choices of a token that are summed without a loop.
_UNROLLED = 16


@dataclasses.dataclass(frozen=True, eq=False)
class Plan(abc.ABC):
    """Where each assignment of a token to an expert is computed.

    The `j`-th choice of token `t` is assignment `t * K + j`. Experts work in
    slots, which a plan numbers expert by expert. A plan is made for one batch
    and used as follows:

        x_SD = plan.dispatch(x_TD)                    # tokens to slots
        y_SO = plan.apply(function, x_SD, kernels)    # experts
        y_TO = plan.combine(y_SO, weight_TK)          # answers to tokens

    `dispatch` and `combine` only gather. Each is the transpose of the other,
    so their gradients gather by the same two tables, and no activation is
    ever scattered.

    Letters: `T` tokens, `K` choices of a token, `A = T * K` assignments, `E`
    experts, `S` slots, `D` and `O` widths of a token and of an answer. With
    `moe_tf.dispatch.plans.Groups` every tensor but `count_E` has a first axis
    `G` of token groups.

    Tables are int32, or int64 where `xla.as_index` makes them so.

    Attributes:
        assignment_S: index `(S,)`, the assignment in each slot; `A` in an
            empty slot.
        slot_TK: index `(T, K)`, the slot of each assignment; `S` for an
            assignment without a slot.
        count_E: int32 `(E,)`, how many tokens chose each expert.
        block_size: optional int, slots in a block where slots lie in blocks
            of one expert each, in an order of their own.
    """

    assignment_S: Tensor
    slot_TK: Tensor
    count_E: Tensor

    block_size = None

    def dispatch(self, x_TD: Tensor) -> Tensor:
        """Gathers tokens into slots.

        Args:
            x_TD: float `(T, D)`.

        Returns:
            Float `(S, D)`; zeros in empty slots.
        """

        @tf.custom_gradient
        def gather(x_TD):
            def gradient(dx_SD):
                return self._sum_choices(
                    lambda j: self.take(dx_SD, self.slot_TK[..., j])
                )

            return self.take(x_TD, self.token_S), gradient

        return gather(x_TD)

    @abc.abstractmethod
    def apply(
        self,
        function: Callable[..., Tensor],
        x_SD: Tensor,
        kernels: Sequence[Tensor],
    ) -> Tensor:
        """Applies a function to the slots and the kernels of each expert.

        Args:
            function: takes rows `(..., C, D)` and one matrix `(..., I, O)` of
                each kernel, with the same leading axes or none, and returns
                rows `(..., C, O)`.
            x_SD: float `(S, D)`, as `dispatch` gives it.
            kernels: float tensors `(E, I, O)`.

        Returns:
            Float `(S, O)`; what empty slots give means nothing.
        """

    def combine(self, y_SD: Tensor, weight_TK: Tensor) -> Tensor:
        """Sums the answers for each token by weight, equation 1.

        Args:
            y_SD: float `(S, D)`, the answers of the experts.
            weight_TK: float `(T, K)`, gate values.

        Returns:
            Float `(T, D)`. An assignment without a slot adds nothing.
        """

        @tf.custom_gradient
        def weighted_sum(y_SD, weight_TK):
            def gradient(dy_TD):
                dy_SD = self.take(dy_TD, self.token_S)
                *leading, tokens, choices = ops.shape(weight_TK)
                weight_A = ops.reshape(weight_TK, (*leading, tokens * choices))
                weight_S = self.take(weight_A, self.assignment_S)
                dweight_S = ops.sum(dy_SD * y_SD, axis=-1)
                dweight_TK = self.take(dweight_S, self.slot_TK)
                return dy_SD * weight_S[..., None], dweight_TK

            def weighted(j):
                answer_TD = self.take(y_SD, self.slot_TK[..., j])
                return weight_TK[..., j, None] * answer_TD

            return self._sum_choices(weighted), gradient

        return weighted_sum(y_SD, weight_TK)

    def collect(self, y_SD: Tensor) -> Tensor:
        """Gathers the answers for each token without summing them.

        Args:
            y_SD: float `(S, D)`.

        Returns:
            Float `(T, K, D)`; zeros for an assignment without a slot.
        """

        @tf.custom_gradient
        def gather(y_SD):
            def gradient(dy_TKD):
                dy_AD = ops.reshape(dy_TKD, (-1, dy_TKD.shape[-1]))
                return self.take(dy_AD, self.assignment_S)

            return self.take(y_SD, self.slot_TK), gradient

        return gather(y_SD)

    @property
    def token_S(self) -> Tensor:
        """The token in each slot; past the last token in empty slots."""
        k = ops.shape(self.slot_TK)[-1]
        return self.assignment_S // cast_like(k, self.assignment_S)

    def dropped_E(self) -> Tensor:
        """Assignments of each expert that have no slot, int32 `(E,)`."""
        return ops.zeros_like(self.count_E)

    def effective_capacity_factor(self) -> Tensor:
        """Slots of an expert over the mean number of assignments, float32.

        What a capacity factor comes to after rounding up. Where nothing
        limits an expert, the busiest expert takes the place of the limit. 0
        if nothing is routed.
        """
        num_experts = self.count_E.shape[0]
        limit = self._total_limit()
        if limit is None:
            limit = ops.max(self.count_E)
        total = ops.cast(ops.sum(self.count_E), "float32")
        limit = ops.cast(limit, "float32")
        return limit * num_experts / ops.maximum(total, 1.0)

    def take(self, x: Tensor, index: Tensor) -> Tensor:
        """Gathers rows of `x`; zeros where `index` is past the last row."""
        return take_or_zero(x, index, batch_dims=0)

    def _total_limit(self):
        """Most assignments that an expert takes, or None without a limit."""
        return None

    def _sum_choices(self, choice):
        """Sums `choice(0) + choice(1) + ...` over the choices of a token.

        A sum over `k` gathers costs half of one gather of `(T, K, D)`. Where
        `k` is not static, or large because a token may have any number of
        experts, only the choices that some token uses are summed.
        """
        k = self.slot_TK.shape[-1]
        if k is not None and k <= _UNROLLED:
            return sum(choice(j) for j in range(k))
        last = self._num_used_choices()
        _, total = tf.while_loop(
            lambda j, total: j < last,
            lambda j, total: (j + 1, total + choice(j)),
            (1, choice(0)),
        )
        return total

    def _num_used_choices(self):
        num_slots = cast_like(size(self.assignment_S), self.slot_TK)
        used_K = ops.any(self.slot_TK < num_slots, axis=0)
        number_K = ops.arange(1, ops.shape(used_K)[0] + 1, dtype="int32")
        return ops.max(ops.where(used_K, number_K, 0), initial=0)


def take_or_zero(x: Tensor, index: Tensor, batch_dims: int) -> Tensor:
    """Gathers rows of `x`; zeros where `index` is past the last row."""
    num_rows = cast_like(ops.shape(x)[batch_dims], index)
    rows = tf.gather(x, ops.minimum(index, num_rows - 1), batch_dims=batch_dims)
    exists = index < num_rows
    for _ in range(len(rows.shape) - len(exists.shape)):
        exists = exists[..., None]
    return ops.where(exists, rows, ops.zeros((), dtype=rows.dtype))


def cast_like(count: int | Tensor, table: Tensor) -> int | Tensor:
    """Returns an int as it is, and casts a scalar to the dtype of a table."""
    return count if isinstance(count, int) else ops.cast(count, table.dtype)


def size(x: Tensor) -> int | Tensor:
    """Number of entries: an int where the shape is static, else a tensor."""
    return math.prod(ops.shape(x))
