"""Learning rates as functions of the step."""

import keras
from keras import ops

from moe_tf import checks


@keras.saving.register_keras_serializable(package="moe_tf")
class WarmupInverseSqrt(keras.optimizers.schedules.LearningRateSchedule):
    """Linear up to `peak`, then proportional to 1 / sqrt(step).

        rate(step) = peak * min(step / warmup, sqrt(warmup / step))

    The rate is 0 at step 0, `peak` at step `warmup_steps`, and continuous.
    The paper's language models warm up for 1000 steps (appendix C); it does
    not give the peak.

    Args:
        peak: float, the largest rate, above 0.
        warmup_steps: int, steps of the linear part, at least 1. Defaults to
            1000.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(self, peak, warmup_steps=1000, name="warmup_inverse_sqrt"):
        super().__init__()
        checks.positive("peak", peak)
        checks.at_least("warmup_steps", warmup_steps, 1)
        self.peak = peak
        self.warmup_steps = warmup_steps
        self.name = name

    def __call__(self, step):
        step = ops.cast(step, "float32")
        warmup = ops.cast(self.warmup_steps, "float32")
        decay = ops.sqrt(warmup / ops.maximum(step, warmup))
        return self.peak * ops.minimum(step / warmup, decay)

    def get_config(self):
        own = ("peak", "warmup_steps", "name")
        return {name: getattr(self, name) for name in own}
