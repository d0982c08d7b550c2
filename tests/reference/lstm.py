"""An LSTM in numpy, step after step, with an optional projection."""

import numpy as np


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def lstm(inputs_BLI, kernel, recurrent_kernel, projection_kernel=None):
    """Sak et al., 2014; without a projection, the plain LSTM.

    Gates are laid out input, forget, candidate, output. Returns the outputs
    of all steps and the last output and memory.
    """
    num_cells = kernel.shape[1] // 4
    if projection_kernel is None:
        projection_kernel = np.eye(num_cells)
    r = np.zeros((len(inputs_BLI), projection_kernel.shape[1]))
    c = np.zeros((len(inputs_BLI), num_cells))
    outputs = []
    for x in np.swapaxes(inputs_BLI, 0, 1):
        i, f, g, o = np.split(x @ kernel + r @ recurrent_kernel, 4, axis=-1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        r = (sigmoid(o) * np.tanh(c)) @ projection_kernel
        outputs.append(r)
    return np.stack(outputs, axis=1), r, c
