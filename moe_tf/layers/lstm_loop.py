"""An LSTM over a sequence, as a loop that DTensor can lay out.

Keras's own loops keep their outputs in TensorLists, which have no layout on a
mesh; unrolled, a program of 69 positions takes 15 s to make, and every
position has all-reduces of its own for the gradients of the kernels. Here
outputs go into plain tensors, and those gradients are one product each.

Letters: `I` input width, `H` memory cells, `P` output width, `G` the four
gates of all cells, 4H.
"""

import tensorflow as tf

from moe_tf import sharding
from moe_tf.layers import mesh_loop


def lstm(x_BLI, kernel_IG, recurrent_PG, projection_HP=None):
    """What `keras.layers.RNN` makes of a `ProjectedLSTMCell` or `LSTMCell`.

    From a zero state, without biases. On a mesh sequences are shared by the
    devices along `batch`, whose number must divide `B`.

    Args:
        x_BLI: float, of known sizes.
        kernel_IG: float.
        recurrent_PG: float.
        projection_HP: optional float. Without it `P` is `H`.

    Returns:
        Float `(B, L, P)`.

    Reference:
     - [Sak et al., 2014](https://arxiv.org/abs/1402.1128)
    """
    kernels = [kernel_IG, recurrent_PG]
    if projection_HP is not None:
        kernels.append(projection_HP)

    @tf.custom_gradient
    def run(x_BLI, *kernels):
        z_LBG = _rows(tf.einsum("BLI,IG->LBG", x_BLI, kernels[0]))
        r_LBP, c_LBH = _forward(z_LBG, *kernels[1:])

        def gradient(dr_BLP):
            dr_LBP = _rows(tf.transpose(dr_BLP, [1, 0, 2]))
            dz_LBG, *dkernels = _backward(
                dr_LBP, z_LBG, r_LBP, c_LBH, *kernels[1:]
            )
            return (
                tf.einsum("LBG,IG->BLI", dz_LBG, kernels[0]),
                tf.einsum("BLI,LBG->IG", x_BLI, dz_LBG),
                *dkernels,
            )

        return tf.transpose(r_LBP, [1, 0, 2]), gradient

    return run(x_BLI, *map(tf.convert_to_tensor, kernels))


def _forward(z_LBG, recurrent_PG, projection_HP=None):
    """Outputs and memory cells at every position."""

    def advance(t, r_BP, c_BH, r_LBP, c_LBH):
        z_BG = _read(z_LBG, t) + tf.matmul(r_BP, recurrent_PG)
        i_BH, f_BH, g_BH, o_BH = _gates(z_BG)
        c_BH = _rows(f_BH * c_BH + i_BH * g_BH)
        r_BP = o_BH * tf.tanh(c_BH)
        if projection_HP is not None:
            r_BP = tf.matmul(r_BP, projection_HP)
        r_BP = _rows(r_BP)
        r_LBP, c_LBH = _append(r_LBP, r_BP), _append(c_LBH, c_BH)
        return t + 1, r_BP, c_BH, r_LBP, c_LBH

    length, batch, _ = z_LBG.shape
    units = z_LBG.shape[-1] // 4
    sizes = (recurrent_PG.shape[0], units)
    states = [_zeros(z_LBG, batch, size) for size in sizes]
    buffers = [_zeros(z_LBG, length, batch, size) for size in sizes]
    *_, r_LBP, c_LBH = mesh_loop.while_loop(
        lambda t, *_: t < length, advance, (0, *states, *buffers)
    )
    return r_LBP, c_LBH


def _backward(dr_LBP, z_LBG, r_LBP, c_LBH, recurrent_PG, projection_HP=None):
    """Gradients of `z_LBG`, of `recurrent_PG` and of `projection_HP`.

    The loop keeps those of outputs and memory cells, which take less room
    than that of `z_LBG`; of them it follows for all positions at once.
    """
    before_LBP, before_LBH = _delayed(r_LBP), _delayed(c_LBH)
    z_LBG += tf.einsum("LBP,PG->LBG", before_LBP, recurrent_PG)
    z_LBG = _rows(z_LBG)

    def retreat(t, dr_BP, dc_BH, all_LBP, all_LBH):
        gates = _gates(_read(z_LBG, t))
        tanh_BH = tf.tanh(_read(c_LBH, t))
        dr_BP = _rows(dr_BP + _read(dr_LBP, t))
        dh_BH = dr_BP
        if projection_HP is not None:
            dh_BH = tf.matmul(dr_BP, projection_HP, transpose_b=True)
        dc_BH = _rows(dc_BH + dh_BH * gates[3] * (1 - tanh_BH**2))
        all_LBP, all_LBH = _prepend(all_LBP, dr_BP), _prepend(all_LBH, dc_BH)
        dz_BG = _of_gates(gates, tanh_BH, _read(before_LBH, t), dh_BH, dc_BH)
        dr_BP = _rows(tf.matmul(dz_BG, recurrent_PG, transpose_b=True))
        return t - 1, dr_BP, _rows(dc_BH * gates[1]), all_LBP, all_LBH

    length, batch, width = z_LBG.shape
    sizes = (recurrent_PG.shape[0], width // 4)
    states = [_zeros(z_LBG, batch, size) for size in sizes]
    buffers = [_zeros(z_LBG, length, batch, size) for size in sizes]
    *_, dr_LBP, dc_LBH = mesh_loop.while_loop(
        lambda t, *_: t >= 0, retreat, (length - 1, *states, *buffers)
    )
    gates, tanh_LBH, dh_LBH = _gates(z_LBG), tf.tanh(c_LBH), dr_LBP
    if projection_HP is not None:
        dh_LBH = tf.einsum("LBP,HP->LBH", dr_LBP, projection_HP)
    dz_LBG = _of_gates(gates, tanh_LBH, before_LBH, dh_LBH, dc_LBH)
    result = [_rows(dz_LBG), tf.einsum("LBP,LBG->PG", before_LBP, dz_LBG)]
    if projection_HP is not None:
        h_LBH = gates[3] * tanh_LBH
        result.append(tf.einsum("LBH,LBP->HP", h_LBH, dr_LBP))
    return result


def _of_gates(gates, tanh, before, dh, dc):
    """Gradient of what the gates are of: of hidden state and memory cells.

    Args:
        gates: those of `_gates`.
        tanh: of the memory cells.
        before: the memory cells one position before.
        dh, dc: the gradients.
    """
    i, f, g, o = gates
    return tf.concat(
        [
            dc * g * i * (1 - i),
            dc * before * f * (1 - f),
            dc * i * (1 - g**2),
            dh * tanh * o * (1 - o),
        ],
        axis=-1,
    )


def _gates(z):
    i, f, g, o = tf.split(z, 4, axis=-1)
    return tf.sigmoid(i), tf.sigmoid(f), tf.tanh(g), tf.sigmoid(o)


def _delayed(x_LBD):
    """What stood one position before; zeros at the first."""
    return _prepend(x_LBD, _zeros(x_LBD, *x_LBD.shape[1:]))


def _read(x_LBD, t):
    """What stands at position `t`."""
    # A gather wants `t` on the device, which holds up a GPU each time.
    _, batch, width = x_LBD.shape
    row_1BD = tf.slice(x_LBD, [t, 0, 0], [1, batch, width])
    return tf.squeeze(row_1BD, axis=0)


# A loop writes its positions one after the other, so arrays that move on by one
# are full at its end. `tf.tensor_scatter_nd_update` copies all positions as
# well, and on GPUs has no bfloat16: it goes by way of the host.


def _append(x_LBD, value_BD):
    """`x_LBD` without its first position, and `value_BD` as the last."""
    length, batch, width = x_LBD.shape
    later = tf.slice(x_LBD, [1, 0, 0], [length - 1, batch, width])
    return _rows(tf.concat([later, tf.expand_dims(value_BD, 0)], axis=0))


def _prepend(x_LBD, value_BD):
    """`x_LBD` without its last position, and `value_BD` as the first."""
    length, batch, width = x_LBD.shape
    # Not `x[:-1]`, here and above: strided slices of two kinds have no layout.
    earlier = tf.slice(x_LBD, [0, 0, 0], [length - 1, batch, width])
    return _rows(tf.concat([tf.expand_dims(value_BD, 0), earlier], axis=0))


def _zeros(like, *shape):
    return _rows(tf.zeros(shape, like.dtype))


def _rows(x):
    """`x (..., B, D)`, sequences shared by the devices along `batch`.

    Loops want it said: their variables must keep their layout.
    """
    return sharding.constrain(x, *(None,) * (x.shape.rank - 2), "batch", None)
