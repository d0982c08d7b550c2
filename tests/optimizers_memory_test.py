"""Appendix D: what the state and a step of `FactoredAdam` take."""

import subprocess
import sys

import keras
import numpy as np
import pytest

from moe_tf.optimizers import FactoredAdam


def state_bytes(optimizer, weight):
    before = {id(v) for v in optimizer.variables}
    optimizer.build([weight])
    slots = [v for v in optimizer.variables if id(v) not in before]
    return sum(np.asarray(v).nbytes for v in slots)


def test_state_is_a_hundredth_of_a_kernel():
    kernel = keras.Variable(np.zeros((2, 512, 1024), "float32"))
    size = np.asarray(kernel).nbytes
    # Less than 1 %; Keras's Adam 200 %, its Adafactor 100 % and more.
    assert state_bytes(FactoredAdam(), kernel) == 2 * (512 + 1024) * 4
    assert state_bytes(FactoredAdam(), kernel) < 0.01 * size
    assert state_bytes(keras.optimizers.Adam(), kernel) == 2 * size
    assert state_bytes(keras.optimizers.Adafactor(), kernel) > size
    with_moment = state_bytes(FactoredAdam(beta_1=0.9), kernel)
    assert size < with_moment < 1.01 * size


def run_alone(code, *arguments):
    command = [sys.executable, "-c", code, *arguments]
    told = subprocess.run(command, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    return told.stdout


STEP = """
import sys
import keras, tensorflow as tf
from moe_tf.benchmarks import memory
from moe_tf.optimizers import FactoredAdam

kernels = [keras.Variable(tf.ones((16, 1024, 1024))) for _ in range(2)]
x_EBD = tf.ones((16, 2, 1024))
optimizer = eval(sys.argv[1])
optimizer.build(kernels)

@tf.function
def step(x_EBD):
    optimizer.apply([
        tf.matmul(x_EBD + i, x_EBD, transpose_a=True) for i in (1.0, 2.0)
    ])

step(x_EBD)
state = sum(4 * int(tf.size(v.value)) for v in optimizer.variables)
print((memory.high_water() - state) / (4 * 16 * 1024 * 1024))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_step_takes_no_memory_of_the_size_of_a_kernel():
    # Peaks less the optimizer's state, in kernels. The weights, the gradients
    # and the process are what plain SGD has; Adam shows the probe sees more.
    plain, factored, adam = (
        float(run_alone(STEP, optimizer))
        for optimizer in (
            "keras.optimizers.SGD()",
            "FactoredAdam()",
            "keras.optimizers.Adam(beta_1=0.0)",
        )
    )
    assert factored < plain + 0.3
    assert adam > plain + 0.9
