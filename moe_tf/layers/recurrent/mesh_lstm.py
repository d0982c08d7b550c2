"""An LSTM over sequences on a mesh, as a loop with DTensor layouts.

An unrolled program of 69 positions takes 15 s to build, and every position
all-reduces the gradients of the kernels. Here each of these gradients is one
product over all positions, and the loops hold only the recurrent part: on
GPUs the time goes with the number of operations in the loop.

Letters: `I` input width, `H` memory cells, `P` output width, `G` the four
gates of all cells, 4H.
"""

import tensorflow as tf

from moe_tf.layers.recurrent import mesh_scan
from moe_tf.types import Tensor


def lstm(
    x_BLI: Tensor,
    kernel_IG: Tensor,
    recurrent_PG: Tensor,
    projection_HP: Tensor | None = None,
) -> Tensor:
    """Runs an LSTM, with or without projection, over whole sequences.

    Equals `keras.layers.RNN` of a `ProjectedLSTMCell`, or of an `LSTMCell`
    without biases, from a zero state. On a mesh the sequences are sharded
    over `batch`, whose size must divide `B`.

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
        z_LBG = mesh_scan.sharded_by_batch(
            tf.einsum("BLI,IG->LBG", x_BLI, kernels[0])
        )
        r_LBP, c_LBH = _forward(z_LBG, *kernels[1:])

        def gradient(dr_BLP):
            dr_LBP = mesh_scan.sharded_by_batch(tf.transpose(dr_BLP, [1, 0, 2]))
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
    """Computes outputs and memory cells of every position."""

    def step(states, rows):
        (r_BP, c_BH), (z_BG,) = states, rows
        i_BH, f_BH, g_BH, o_BH = _gates(z_BG + tf.matmul(r_BP, recurrent_PG))
        c_BH = f_BH * c_BH + i_BH * g_BH
        r_BP = o_BH * tf.tanh(c_BH)
        if projection_HP is not None:
            r_BP = tf.matmul(r_BP, projection_HP)
        return (r_BP, c_BH), (r_BP, c_BH)

    widths = recurrent_PG.shape[0], z_LBG.shape[-1] // 4
    return mesh_scan.scan(step, [z_LBG], widths)


def _backward(dr_LBP, z_LBG, r_LBP, c_LBH, recurrent_PG, projection_HP=None):
    """Computes gradients of `z_LBG`, `recurrent_PG` and `projection_HP`.

    The loop collects the gradients of outputs and memory cells, which are
    smaller than the gradient of `z_LBG`. All other gradients follow from
    these two for all positions at once.
    """
    before_LBP = mesh_scan.delayed(r_LBP)
    z_LBG += tf.einsum("LBP,PG->LBG", before_LBP, recurrent_PG)
    i, f, g, o = _gates(mesh_scan.sharded_by_batch(z_LBG))
    tanh_LBH = tf.tanh(c_LBH)
    # Derivatives by `z`: of the memory cells for the gates `i`, `f` and `g`,
    # of the hidden state for `o`.
    slopes = [
        g * i * (1 - i),
        mesh_scan.delayed(c_LBH) * f * (1 - f),
        i * (1 - g**2),
        tanh_LBH * o * (1 - o),
    ]
    slope_LBG = mesh_scan.sharded_by_batch(tf.concat(slopes, axis=-1))
    slope_LBH = mesh_scan.sharded_by_batch(o * (1 - tanh_LBH**2))

    def step(states, rows):
        (dr_BP, dc_BH), (upstream_BP, slope_BG, slope_BH, f_BH) = states, rows
        dr_BP += upstream_BP
        dh_BH = dr_BP
        if projection_HP is not None:
            dh_BH = tf.matmul(dr_BP, projection_HP, transpose_b=True)
        dc_BH += dh_BH * slope_BH
        dz_BG = _stack_gates(dc_BH, dh_BH) * slope_BG
        before_BP = tf.matmul(dz_BG, recurrent_PG, transpose_b=True)
        return (before_BP, dc_BH * f_BH), (dr_BP, dc_BH)

    sequences = [dr_LBP, slope_LBG, slope_LBH, mesh_scan.sharded_by_batch(f)]
    widths = r_LBP.shape[-1], c_LBH.shape[-1]
    dr_LBP, dc_LBH = mesh_scan.scan(step, sequences, widths, reverse=True)
    dh_LBH = dr_LBP
    if projection_HP is not None:
        dh_LBH = tf.einsum("LBP,HP->LBH", dr_LBP, projection_HP)
    dz_LBG = mesh_scan.sharded_by_batch(
        _stack_gates(dc_LBH, dh_LBH) * slope_LBG
    )
    result = [dz_LBG, tf.einsum("LBP,LBG->PG", before_LBP, dz_LBG)]
    if projection_HP is not None:
        h_LBH = o * tanh_LBH
        result.append(tf.einsum("LBH,LBP->HP", h_LBH, dr_LBP))
    return result


def _stack_gates(dc, dh):
    """Stacks the gradients of all gates: `dc` for i, f and g, `dh` for o."""
    return tf.concat([dc, dc, dc, dh], axis=-1)


def _gates(z):
    i, f, g, o = tf.split(z, 4, axis=-1)
    return tf.sigmoid(i), tf.sigmoid(f), tf.tanh(g), tf.sigmoid(o)
