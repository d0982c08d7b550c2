"""Metrics that show in the logs of `fit` and `evaluate`."""

from collections.abc import Sequence

import keras
from keras import ops

from moe_tf import losses
from moe_tf.types import Tensor

__all__ = [
    "BALANCE_STATISTICS",
    "ExpertBalance",
    "Perplexity",
    "WordCount",
    "balance_statistics",
]


def __dir__() -> list[str]:
    return __all__


@keras.saving.register_keras_serializable(package="moe_tf")
class Perplexity(keras.metrics.Mean):
    """Exponential of the mean negative log-likelihood per word.

    `update_state(y_true, y_pred, sample_weight)`: `y_pred` holds the
    negative log-likelihood of each word in nats, `sample_weight` is 1 for a
    word that counts and 0 for padding. `y_true` is ignored. The mean is over
    the words of all batches. The sum is float64: float32 would round away
    part of each batch of a long epoch.

    Args:
        name: string. Defaults to `"perplexity"`.
        dtype: of the sums. Defaults to `"float64"`.

    Example:

    >>> perplexity = moe_tf.metrics.Perplexity()
    >>> perplexity.update_state(None, np.log([[2.0, 8.0]]))
    >>> print(f"{float(perplexity.result()):.4f}")
    4.0000
    """

    def __init__(
        self, name: str = "perplexity", dtype: str = "float64"
    ) -> None:
        super().__init__(name=name, dtype=dtype)

    def update_state(self, y_true, y_pred, sample_weight=None):
        # Flat: Keras takes the mean of each row first, and would give a word
        # in a short row more weight than a word in a long one.
        if sample_weight is not None:
            sample_weight = ops.broadcast_to(sample_weight, ops.shape(y_pred))
            sample_weight = ops.reshape(sample_weight, (-1,))
        super().update_state(ops.reshape(y_pred, (-1,)), sample_weight)

    def result(self):
        return ops.exp(super().result())


@keras.saving.register_keras_serializable(package="moe_tf")
class WordCount(keras.metrics.Sum):
    """Sum of the sample weights: the number of words without padding.

    Args:
        name: string. Defaults to `"words"`.
        dtype: of the sum. Defaults to `"float64"`, which is exact beyond
            2^24 words.

    Example:

    >>> words = moe_tf.metrics.WordCount()
    >>> words.update_state(None, np.zeros((1, 3)), np.array([[1, 1, 0]]))
    >>> int(words.result())
    2
    """

    def __init__(self, name: str = "words", dtype: str = "float64") -> None:
        super().__init__(name=name, dtype=dtype)

    def update_state(self, y_true, y_pred, sample_weight=None):
        if sample_weight is None:
            sample_weight = ops.ones_like(y_pred)
        super().update_state(ops.broadcast_to(sample_weight, ops.shape(y_pred)))


@keras.saving.register_keras_serializable(package="moe_tf")
class ExpertBalance(keras.metrics.Metric):
    """Statistics of the balance of one layer's experts, as in table 6.

    `result()` is a dictionary of scalars, means over the batches since the
    last reset: the coefficients of variation of importance and load, the
    largest load over the mean load (1 is perfect), the fraction of
    assignments that were dropped, and the layer's own scalars, `scalars`.
    The number of scalars does not depend on the number of experts.

    Args:
        num_experts: int.
        scalars: names of further scalars.
        name: string, put before each key of the result.
        dtype: of the variables. Defaults to `"float32"`.

    Attributes:
        importance_E, load_E, assigned_E, dropped_E: float, the vectors of the
            last batch.

    Example:

    >>> balance = moe_tf.metrics.ExpertBalance(2)
    >>> load_E = np.array([3.0, 1.0])
    >>> balance.update_state(load_E, load_E, load_E, np.zeros(2))
    >>> float(balance.result()["balance_max_over_mean_load"])
    1.5
    """

    def __init__(
        self,
        num_experts: int,
        scalars: Sequence[str] = (),
        name: str = "balance",
        dtype: str = "float32",
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        self.num_experts = num_experts
        self.scalars = tuple(scalars)
        self.importance_E, self.load_E, self.assigned_E, self.dropped_E = (
            self.add_variable((num_experts,), "zeros", name=vector)
            for vector in ("importance", "load", "assigned", "dropped")
        )
        self.names = (*BALANCE_STATISTICS, *self.scalars)
        # One variable for all: on a GPU each costs a kernel launch a step.
        self.total_N, self.latest_N = (
            self.add_variable((len(self.names),), "zeros", name=name)
            for name in ("total", "latest")
        )
        self.batches = self.add_variable((), "zeros", name="batches")

    def update_state(
        self, importance_E, load_E, assigned_E, dropped_E, **scalars
    ):
        """Adds one batch: vectors, each `(num_experts,)`, and scalars."""
        vectors = [
            ops.cast(vector, self.dtype)
            for vector in (importance_E, load_E, assigned_E, dropped_E)
        ]
        for variable, vector in zip(self.vectors, vectors, strict=True):
            variable.assign(vector)
        values = {**balance_statistics(*vectors), **scalars}
        value_N = ops.stack(
            [ops.cast(values[name], self.dtype) for name in self.names]
        )
        self.total_N.assign_add(value_N)
        self.latest_N.assign(value_N)
        self.batches.assign_add(1.0)

    @property
    def vectors(self) -> tuple[keras.Variable, ...]:
        """Importance, load, assigned and dropped of the last batch."""
        return self.importance_E, self.load_E, self.assigned_E, self.dropped_E

    def latest(self) -> dict[str, Tensor]:
        """Returns the scalars of the last batch by name."""
        return self._by_name(self.latest_N)

    def statistics(self) -> dict[str, Tensor]:
        """Returns the means of `BALANCE_STATISTICS` and `scalars` by name."""
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
            "scalars": self.scalars,
            "name": self.name,
            "dtype": self.dtype,
        }

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        if "numbers" in config:  # the name of `scalars` in older files
            config["scalars"] = config.pop("numbers")
        return cls(**config)


BALANCE_STATISTICS = (
    "cv_importance",
    "cv_load",
    "max_over_mean_load",
    "dropped_fraction",
)


def balance_statistics(
    importance_E: Tensor, load_E: Tensor, assigned_E: Tensor, dropped_E: Tensor
) -> dict[str, Tensor]:
    """Computes `BALANCE_STATISTICS` of one batch; zeros if no token is routed.

    Args:
        importance_E: float, sums of the gate values, equation 6.
        load_E: float, load, equation 10.
        assigned_E: float, number of tokens that chose each expert.
        dropped_E: float, number of these tokens beyond the capacity.

    Returns:
        Dictionary of float scalars.

    Example:

    >>> load_E = np.array([3.0, 1.0])
    >>> statistics = moe_tf.metrics.balance_statistics(
    ...     load_E, load_E, load_E, np.array([1.0, 0.0])
    ... )
    >>> float(statistics["dropped_fraction"])
    0.25
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
