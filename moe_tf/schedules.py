"""Learning rates as functions of the step."""

import keras
from keras import ops

from moe_tf import checks


@keras.saving.register_keras_serializable(package="moe_tf")
class WarmupInverseSqrt(keras.optimizers.schedules.LearningRateSchedule):
    """Linear up to `peak`, constant, then proportional to 1 / sqrt(step).

        end = warmup + constant
        rate(step) = peak * min(step / warmup, 1, sqrt(end / step))

    The rate is 0 at step 0, `peak` from step `warmup_steps` on for
    `constant_steps`, and continuous. The paper's language models warm up for
    1000 steps (appendix C), its translation models for 2000 and stay for 8000
    (appendix E); it does not give the peak.

    Args:
        peak: float, the largest rate, above 0.
        warmup_steps: int, steps of the linear part, at least 1. Defaults to
            1000.
        constant_steps: int, steps at `peak`. Defaults to 0.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(
        self,
        peak,
        warmup_steps=1000,
        constant_steps=0,
        name="warmup_inverse_sqrt",
    ):
        super().__init__()
        checks.positive("peak", peak)
        checks.at_least("warmup_steps", warmup_steps, 1)
        checks.at_least("constant_steps", constant_steps, 0)
        self.peak = peak
        self.warmup_steps = warmup_steps
        self.constant_steps = constant_steps
        self.name = name

    def __call__(self, step):
        step = ops.cast(step, "float32")
        warmup = ops.cast(self.warmup_steps, "float32")
        end = ops.cast(self.warmup_steps + self.constant_steps, "float32")
        decay = ops.sqrt(end / ops.maximum(step, end))
        return self.peak * ops.minimum(step / warmup, decay)

    def get_config(self):
        own = ("peak", "warmup_steps", "constant_steps", "name")
        return {name: getattr(self, name) for name in own}
