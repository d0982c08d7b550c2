"""Learning-rate schedules."""

import keras
from keras import ops

from moe_tf import checks
from moe_tf.types import Tensor

__all__ = [
    "WarmupInverseSqrt",
]


def __dir__() -> list[str]:
    return __all__


@keras.saving.register_keras_serializable(package="moe_tf")
class WarmupInverseSqrt(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up to `peak`, constant steps, then decay by 1 / sqrt(step).

        end = warmup + constant
        rate(step) = peak * min(step / warmup, 1, sqrt(end / step))

    The rate is continuous: 0 at step 0, and `peak` from step `warmup_steps`
    on for `constant_steps`. The paper's language models warm up for 1000 steps
    (appendix C). Its translation models warm up for 2000 steps and keep the
    peak for 8000 (appendix E). The paper does not give the peak.

    Args:
        peak: float, the largest rate, above 0.
        warmup_steps: int, steps of the linear part, at least 1. Defaults to
            1000.
        constant_steps: int, steps at `peak`. Defaults to 0.
        name: string. Defaults to `"warmup_inverse_sqrt"`.

    Raises:
        ValueError: if an argument is out of its range.

    Example:

    >>> rate = moe_tf.schedules.WarmupInverseSqrt(0.1, warmup_steps=100)
    >>> [round(float(rate(step)), 3) for step in (0, 50, 100, 400)]
    [0.0, 0.05, 0.1, 0.05]
    """

    def __init__(
        self,
        peak: float,
        warmup_steps: int = 1000,
        constant_steps: int = 0,
        name: str = "warmup_inverse_sqrt",
    ) -> None:
        super().__init__()
        checks.positive("peak", peak)
        checks.at_least("warmup_steps", warmup_steps, 1)
        checks.at_least("constant_steps", constant_steps, 0)
        self.peak = peak
        self.warmup_steps = warmup_steps
        self.constant_steps = constant_steps
        self.name = name

    def __call__(self, step: Tensor | int) -> Tensor:
        step = ops.cast(step, "float32")
        warmup = ops.cast(self.warmup_steps, "float32")
        end = ops.cast(self.warmup_steps + self.constant_steps, "float32")
        decay = ops.sqrt(end / ops.maximum(step, end))
        return self.peak * ops.minimum(step / warmup, decay)

    def get_config(self):
        own = ("peak", "warmup_steps", "constant_steps", "name")
        return {name: getattr(self, name) for name in own}
