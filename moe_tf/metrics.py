"""Metrics that show in the logs of `fit` and `evaluate`."""

import keras
from keras import ops

from moe_tf import losses


@keras.saving.register_keras_serializable(package="moe_tf")
class Perplexity(keras.metrics.Mean):
    """Exponential of the mean negative log-likelihood per word.

    `update_state(y_true, y_pred, sample_weight)`: `y_pred` holds the
    negative log-likelihood of each word in nats, `sample_weight` is 1 for a
    word that counts and 0 for padding. `y_true` is not looked at. Over
    several batches the words weigh alike, not the batches. The sum is
    float64: float32 would round away part of each batch of a long epoch.
    """

    def __init__(self, name="perplexity", dtype="float64"):
        super().__init__(name=name, dtype=dtype)

    def update_state(self, y_true, y_pred, sample_weight=None):
        # Flat, since Keras takes the mean of each row first: words of short
        # batches would count more than those of long ones.
        if sample_weight is not None:
            sample_weight = ops.broadcast_to(sample_weight, ops.shape(y_pred))
            sample_weight = ops.reshape(sample_weight, (-1,))
        super().update_state(ops.reshape(y_pred, (-1,)), sample_weight)

    def result(self):
        return ops.exp(super().result())


@keras.saving.register_keras_serializable(package="moe_tf")
class WordCount(keras.metrics.Sum):
    """Number of words that counted, from the sample weights.

    Float64, so that the count is exact beyond 2^24 words.
    """

    def __init__(self, name="words", dtype="float64"):
        super().__init__(name=name, dtype=dtype)

    def update_state(self, y_true, y_pred, sample_weight=None):
        if sample_weight is None:
            sample_weight = ops.ones_like(y_pred)
        super().update_state(ops.broadcast_to(sample_weight, ops.shape(y_pred)))


@keras.saving.register_keras_serializable(package="moe_tf")
class ExpertBalance(keras.metrics.Metric):
    """How evenly one layer uses its experts, in the numbers of table 6.

    `result()` is a dictionary of scalars, means over the batches since the
    last reset: the coefficients of variation of importance and load, the
    largest load over the mean load (1 is perfect), the fraction of
    assignments that were dropped, and any `numbers` that the layer brings.
    However many experts there are, their number stays the same. The vectors
    of the last batch are kept in `importance_E`, `load_E`, `assigned_E` and
    `dropped_E`.

    Args:
        num_experts: int.
        numbers: names of further scalars.
        name: string, put before each key of the result.
    """

    def __init__(
        self, num_experts, numbers=(), name="balance", dtype="float32"
    ):
        super().__init__(name=name, dtype=dtype)
        self.num_experts = num_experts
        self.numbers = tuple(numbers)
        self.importance_E, self.load_E, self.assigned_E, self.dropped_E = (
            self.add_variable((num_experts,), "zeros", name=vector)
            for vector in ("importance", "load", "assigned", "dropped")
        )
        self.names = (*BALANCE_STATISTICS, *self.numbers)
        # Together, since on a GPU each variable costs a launch a step.
        self.total_N, self.latest_N = (
            self.add_variable((len(self.names),), "zeros", name=name)
            for name in ("total", "latest")
        )
        self.batches = self.add_variable((), "zeros", name="batches")

    def update_state(
        self, importance_E, load_E, assigned_E, dropped_E, **numbers
    ):
        """Takes one batch's vectors, each `(num_experts,)`, and scalars."""
        vectors = [
            ops.cast(vector, self.dtype)
            for vector in (importance_E, load_E, assigned_E, dropped_E)
        ]
        for variable, vector in zip(self.vectors, vectors, strict=True):
            variable.assign(vector)
        values = {**balance_statistics(*vectors), **numbers}
        value_N = ops.stack(
            [ops.cast(values[name], self.dtype) for name in self.names]
        )
        self.total_N.assign_add(value_N)
        self.latest_N.assign(value_N)
        self.batches.assign_add(1.0)

    @property
    def vectors(self):
        """Importance, load, assigned and dropped of the last batch."""
        return self.importance_E, self.load_E, self.assigned_E, self.dropped_E

    def latest(self):
        """The scalars of the last batch by name."""
        return self._by_name(self.latest_N)

    def statistics(self):
        """Means of the scalars by name: `BALANCE_STATISTICS`, `numbers`."""
        return self._by_name(self.total_N / ops.maximum(self.batches, 1.0))

    def _by_name(self, value_N):
        values = ops.unstack(value_N, len(self.names))
        return dict(zip(self.names, values, strict=True))

    def result(self):
        return {
            f"{self.name}_{name}": value
            for name, value in self.statistics().items()
        }

    def get_config(self):
        return {
            "num_experts": self.num_experts,
            "numbers": self.numbers,
            "name": self.name,
            "dtype": self.dtype,
        }


BALANCE_STATISTICS = (
    "cv_importance",
    "cv_load",
    "max_over_mean_load",
    "dropped_fraction",
)


def balance_statistics(importance_E, load_E, assigned_E, dropped_E):
    """The scalars `BALANCE_STATISTICS` of one batch, as a dictionary.

    A batch without a single routed token gives zeros.
    """
    mean_load = ops.maximum(ops.mean(load_E), 1e-10)
    num_assigned = ops.maximum(ops.sum(assigned_E), 1.0)
    values = (
        ops.sqrt(losses.cv_squared(importance_E)),
        ops.sqrt(losses.cv_squared(load_E)),
        ops.max(load_E) / mean_load,
        ops.sum(dropped_E) / num_assigned,
    )
    return dict(zip(BALANCE_STATISTICS, values, strict=True))
