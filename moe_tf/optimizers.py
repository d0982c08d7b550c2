"""Adam with a factored second moment, for experts (appendix D)."""

from collections.abc import Callable
from collections.abc import Sequence

import keras
import tensorflow as tf
from keras import ops

from moe_tf import checks
from moe_tf import xla
from moe_tf.types import Tensor

__all__ = [
    "FactoredAdam",
]


def __dir__() -> list[str]:
    return __all__


@keras.saving.register_keras_serializable(package="moe_tf")
class FactoredAdam(keras.optimizers.Optimizer):
    """Adam with a factored second moment and, by default, no first moment.

    For a weight with two or more axes the state holds only running means of
    the squared gradients: `R` over each row and `C` over each column. Rows
    and columns are those of the last two axes; every index of the leading
    axes (an expert) is a separate matrix. The second moment is estimated as

        v_ij = R_i * C_j / mean(R)

    which is exact where the squared gradients have rank one, as for an expert
    with one token. The estimate can be far too small where large gradients
    share neither rows nor columns with small ones, as in a diagonal matrix:
    steps are then larger than Adam's. Weights with one axis or none have the
    whole second moment.

        weight -= learning_rate * m / (sqrt(v) + epsilon)

    with `m` the gradient if `beta_1` is 0, and both moments divided by
    `1 - beta ** step`. `epsilon` is added to each of the three roots of the
    factored `sqrt(v)`. A weight whose gradients have all been zero, such as
    the weight of an expert that never had a token, does not change.

    The state of an `(E, D, F)` kernel has `E * (D + F)` entries. They are
    float32 even for a 16-bit kernel. In a `tf.function` without XLA the step
    of a float32 kernel is computed in place of its gradient and takes no
    further memory of the kernel's size (one such tensor if `beta_1` is above
    0). Sparse gradients are made dense: the squares need the sums over
    repeated indices, and the means need every row.

    Args:
        learning_rate: float, schedule or callable. Defaults to `0.001`.
        beta_1: float in [0, 1), decay of the first moment, which is as large
            as the weights. Defaults to `0.0`, no first moment, the paper's.
        beta_2: float in [0, 1), decay of the second moment. The paper gives
            no value. Defaults to `0.98`, as in tensor2tensor; with Adam's
            `0.999` a language model learned more slowly.
        epsilon: float, above 0. The paper gives no value. Defaults to
            `1e-10`, as in tensor2tensor: the gradients of an expert shrink
            with its fraction of the tokens, so a larger value would slow
            down the experts that are rarely used.
        **kwargs: arguments of `keras.optimizers.Optimizer`.

    Raises:
        ValueError: if an argument is out of its range.

    Reference:
     - [Shazeer et al., 2017](https://arxiv.org/abs/1701.06538), appendix D

    Example:

    >>> kernel = keras.Variable(np.ones((4, 8, 16)))
    >>> optimizer = moe_tf.optimizers.FactoredAdam(0.1)
    >>> optimizer.build([kernel])
    >>> [tuple(v.shape) for v in optimizer.variables if len(v.shape) > 1]
    [(4, 8), (4, 16)]
    >>> optimizer.apply([ops.ones_like(kernel)])
    >>> print(f"{float(kernel[0, 0, 0]):.3f}")
    0.900
    """

    def __init__(
        self,
        learning_rate: float
        | keras.optimizers.schedules.LearningRateSchedule
        | Callable[[], float] = 0.001,
        beta_1: float = 0.0,
        beta_2: float = 0.98,
        epsilon: float = 1e-10,
        **kwargs,
    ) -> None:
        super().__init__(learning_rate=learning_rate, **kwargs)
        for name, value in (("beta_1", beta_1), ("beta_2", beta_2)):
            if not 0 <= value < 1:
                raise ValueError(
                    f"`{name}` must be at least 0 and below 1. "
                    f"Received: {name}={value}"
                )
        checks.positive("epsilon", epsilon)
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.epsilon = epsilon

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        if self.beta_1:
            self._momentums = self.add_optimizer_variables(
                variables, "momentum"
            )
        self._velocities = [self._add_velocity(v) for v in variables]

    def _add_velocity(self, variable):
        """Makes the state `[R, C]` of a stack of matrices, or else `[v]`."""
        shape = tuple(variable.shape)
        if len(shape) < 2:
            parts = {"velocity": shape}
        else:
            parts = {
                "velocity_row": shape[:-1],
                "velocity_column": shape[:-2] + shape[-1:],
            }
        # The base class builds the names of its slots from the same path.
        path = getattr(variable, "path", variable.name)
        path = path.replace("/", "_").replace(":", "_")
        return [
            self.add_variable(
                shape=part_shape,
                # 16 bits would round away a change by a thousandth.
                dtype=keras.backend.result_type(variable.dtype, "float32"),
                name=f"{path}_{part}",
            )
            for part, part_shape in parts.items()
        ]

    def update_step(self, gradient, variable, learning_rate):
        index = self._get_variable_index(variable)
        slots = self._velocities[index]
        dtype = slots[0].dtype
        gradient = ops.cast(tf.convert_to_tensor(gradient), dtype)
        rate = ops.cast(learning_rate, dtype)
        step = ops.cast(self.iterations + 1, dtype)
        beta_1, beta_2 = (
            ops.convert_to_tensor(beta, dtype)
            for beta in (self.beta_1, self.beta_2)
        )
        if len(slots) == 1:
            squares = [ops.square(gradient)]
        else:
            squares = mean_squares(gradient, hasattr(variable, "layout"))
        correction = 1.0 - ops.power(beta_2, step)
        velocity = []
        for slot, square in zip(slots, squares, strict=True):
            value = slot + (square - slot) * (1.0 - self.beta_2)
            self.assign(slot, value)
            velocity.append(value / correction)
        if self.beta_1:
            slot = self._momentums[index]
            change = (gradient - ops.cast(slot, dtype)) * (1.0 - self.beta_1)
            self.assign_add(slot, change)
            gradient = ops.cast(slot, dtype)
            rate /= 1.0 - ops.power(beta_1, step)
        self.assign_sub(
            variable, scaled_step(gradient, rate, velocity, self.epsilon)
        )

    def get_config(self):
        own = ("beta_1", "beta_2", "epsilon")
        return {
            **super().get_config(),
            **{name: getattr(self, name) for name in own},
        }


def mean_squares(x: Tensor, is_sharded: bool = False) -> tuple[Tensor, Tensor]:
    """Computes means of `x ** 2` over the last axis and over the one before.

    Args:
        x: float tensor of rank 2 or more.
        is_sharded: bool, whether `x` is a DTensor.

    Returns:
        Two tensors: one without the last axis, one without the axis before.
    """
    # Neither DTensor nor XLA has `reduce_euclidean_norm`.
    if is_sharded or xla.wants_static_shapes():
        square = ops.square(x)
        return ops.mean(square, axis=-1), ops.mean(square, axis=-2)
    # The norm squares as it sums, so the squares of `x` never exist.
    return tuple(
        ops.square(tf.math.reduce_euclidean_norm(x, axis=axis))
        / ops.cast(ops.shape(x)[axis], x.dtype)
        for axis in (-1, -2)
    )


def scaled_step(
    moment: Tensor, rate: Tensor, velocity: Sequence[Tensor], epsilon: float
) -> Tensor:
    """Computes `rate * moment / (sqrt(v) + epsilon)`.

    Args:
        moment: float tensor, a gradient or its running mean.
        rate: float scalar.
        velocity: `[v]`, of the shape of `moment`, or `[R, C]`: then `v` is
            the outer product of `R` and `C` over their common mean, for every
            index of the leading axes. `epsilon` is added to each root.
        epsilon: float, above 0.

    Returns:
        Tensor of the shape of `moment`.
    """
    roots = [ops.sqrt(part) + epsilon for part in velocity]
    if len(velocity) == 1:
        return rate * moment / roots[0]
    # TensorFlow computes a quotient in place of `moment` if nothing else uses
    # `moment`. The mean is taken over `C`, not over the equal `R`, so that the
    # first quotient comes after both reductions of the gradient. Quotients
    # instead of products: the graph optimizer would regroup products into
    # further tensors of the size of `moment`.
    mean = ops.mean(velocity[1], axis=-1, keepdims=True)
    row = roots[0] / (ops.sqrt(mean) + epsilon)
    return rate * (moment / row[..., None] / roots[1][..., None, :])
