"""Adam whose state is small beside the weights, for experts (appendix D)."""

import keras
import tensorflow as tf
from keras import ops

from moe_tf import checks
from moe_tf import xla


@keras.saving.register_keras_serializable(package="moe_tf")
class FactoredAdam(keras.optimizers.Optimizer):
    """Adam with a factored second moment and, by default, no first moment.

    Of a weight with two or more axes only the running means of the squared
    gradients along its rows, `R`, and along its columns, `C`, are kept. Rows
    and columns are those of the last two axes; every index of the leading
    axes (an expert) is a matrix by itself. The second moment is taken to be

        v_ij = R_i * C_j / mean(R)

    which is exact where squared gradients are of rank one, as for an expert
    with one token. It can be far too small where large gradients share
    neither rows nor columns with small ones (`C` and `R` of a diagonal
    matrix, say): steps are then larger than Adam's. Weights with one axis or
    none have the whole second moment.

        weight -= learning_rate * m / (sqrt(v) + epsilon)

    with `m` the gradient if `beta_1` is 0, and both moments divided by
    `1 - beta ** step`. `epsilon` is added to each of the three roots of the
    factored `sqrt(v)`. Weights whose gradients have all been zero, such as
    those of an expert that never had a token, stay as they are.

    An `(E, D, F)` kernel has `E * (D + F)` numbers of state, in float32 also
    if the kernel is of 16 bits. In a `tf.function` without XLA the step of a
    float32 kernel is computed in place of its gradient and takes no further
    memory of the kernel's size (with `beta_1` above 0 one tensor of it).
    Sparse gradients are made dense: the squares need the sums over repeated
    indices, and the means every row.

    Args:
        learning_rate: float, schedule or callable. Defaults to `0.001`.
        beta_1: float in [0, 1), decay of the first moment, which is as large
            as the weights. Defaults to `0.0`, no first moment, the paper's.
        beta_2: float in [0, 1), decay of the second moment. The paper gives
            no value. Defaults to `0.98`, that of tensor2tensor; with Adam's
            `0.999` a language model learned more slowly.
        epsilon: float, above 0. The paper gives no value. Defaults to
            `1e-10`, that of tensor2tensor: the gradients of an expert shrink
            with its share of the tokens, so a larger one would first hold
            back the experts that are rarely used.
        **kwargs: those of `keras.optimizers.Optimizer`.

    Raises:
        ValueError: if an argument is out of its range.

    Reference:
     - [Shazeer et al., 2017](https://arxiv.org/abs/1701.06538), appendix D
    """

    def __init__(
        self,
        learning_rate=0.001,
        beta_1=0.0,
        beta_2=0.98,
        epsilon=1e-10,
        **kwargs,
    ):
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
        """`[R, C]` of a matrix or stack of matrices, else the whole `[v]`."""
        shape = tuple(variable.shape)
        if len(shape) < 2:
            parts = {"velocity": shape}
        else:
            parts = {
                "velocity_row": shape[:-1],
                "velocity_column": shape[:-2] + shape[-1:],
            }
        # As the base class names slots of the variable's own shape.
        path = getattr(variable, "path", variable.name)
        path = path.replace("/", "_").replace(":", "_")
        return [
            self.add_variable(
                shape=part_shape,
                # 16 bits would round away a thousandth of a change.
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


def mean_squares(x, is_sharded=False):
    """Means of `x ** 2` over the last axis, and over the one before it.

    Args:
        x: float tensor of rank 2 or more.
        is_sharded: bool, whether `x` is a DTensor.

    Returns:
        Two tensors, of shape `x.shape[:-1]` and without the axis before the
        last.
    """
    # Neither DTensor nor XLA has the norm.
    if is_sharded or xla.wants_static_shapes():
        square = ops.square(x)
        return ops.mean(square, axis=-1), ops.mean(square, axis=-2)
    # The norm squares as it sums, so the squares of `x` never exist.
    return tuple(
        ops.square(tf.math.reduce_euclidean_norm(x, axis=axis))
        / ops.cast(ops.shape(x)[axis], x.dtype)
        for axis in (-1, -2)
    )


def scaled_step(moment, rate, velocity, epsilon):
    """`rate * moment / (sqrt(v) + epsilon)`.

    Args:
        moment: float tensor, a gradient or its running mean.
        rate: float scalar.
        velocity: `[v]`, of the shape of `moment`, or `[R, C]`: then `v` is
            the outer product of `R` and `C`, which are stacked like `moment`,
            over their mean (they have the same). `epsilon` is added to each
            root.
        epsilon: float, above 0.

    Returns:
        A tensor like `moment`.
    """
    roots = [ops.sqrt(part) + epsilon for part in velocity]
    if len(velocity) == 1:
        return rate * moment / roots[0]
    # In place of `moment`, if nothing else holds it. Hence the mean of `C`,
    # which is that of `R`: the first quotient comes after both reductions of
    # a gradient. Hence quotients: the graph optimizer regroups products with
    # each other and with what made `moment`, into tensors of its size.
    mean = ops.mean(velocity[1], axis=-1, keepdims=True)
    row = roots[0] / (ops.sqrt(mean) + epsilon)
    return rate * (moment / row[..., None] / roots[1][..., None, :])
