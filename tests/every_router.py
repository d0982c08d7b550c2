"""A small layer of every router, its gate away from its start."""

import numpy as np

import moe_tf

NUM_EXPERTS = 8
WIDTH = 6
SETTINGS = {
    "noisy_top_k": {"k": 2},
    "hierarchical": {"branching": (2, 4)},
    "softmax_top_k": {"gating": "softmax_top_k", "k": 2},
    "switch": {"gating": "switch"},
    "batchwise": {"gating": "batchwise", "k": 2},
    "hierarchical_batchwise": {"gating": "batchwise", "branching": (2, 4)},
    "expert_choice": {"gating": "expert_choice", "k": 2},
}

# Each kind of router once: one level with noise, two levels, thresholds.
FEW = ("noisy_top_k", "hierarchical_batchwise", "switch")


def layer(name, *, quiet=False, **kwargs):
    """`SparseMoE` of 8 experts, the same weights each time.

    Args:
        name: a key of `SETTINGS`.
        quiet: bool, whether the gate's noise is too small to be seen for
            tokens of `tokens`.
        **kwargs: further arguments of `SparseMoE`.
    """
    kwargs = {"dtype": "float64", "seed": 3, **SETTINGS[name], **kwargs}
    made = moe_tf.SparseMoE(NUM_EXPERTS, WIDTH, name="moe", **kwargs)
    made.build((None, WIDTH))
    rng = np.random.default_rng(5)
    for variable in made.trainable_variables:
        value = rng.normal(size=variable.shape)
        if variable.name.endswith("thresholds"):
            value = np.full(variable.shape, 1 / variable.shape[-1])
        if quiet and "noise" in variable.name:
            value = np.zeros(variable.shape)
            value[..., 0, :] = -99.0
        variable.assign(value)
    return made


def tokens(*shape, seed=0):
    """Float `(*shape, WIDTH)`; the first entry of each token is 1."""
    x = np.random.default_rng(seed).normal(size=(*shape, WIDTH))
    x[..., 0] = 1.0
    return x


def collapse(layer):
    """Sends every token to the first experts, whatever it holds."""
    for variable in layer.router.trainable_variables:
        value = np.zeros(variable.shape)
        if "noise" in variable.name:
            value[..., 0, :] = -99.0
        elif len(variable.shape) > 1:
            value[..., 0, :] = -9.0 * np.arange(variable.shape[-1])
        variable.assign(value)


def spread(layer):
    """Sets the gate, and returns a token for each expert, for equal load.

    Experts and tokens lie on a circle; a token's logits are the cosines of
    its angles to the experts. Branches of experts get equal logits.
    """
    for variable in layer.router.trainable_variables:
        if variable.name in ("gate_kernel", "secondary_gate_kernel"):
            value = np.zeros(variable.shape)
            value[..., 1:3, :] = _on_circle(variable.shape[-1])
            variable.assign(value)
        elif variable.name == "primary_gate_kernel":
            variable.assign(np.zeros(variable.shape))
    x_TD = tokens(NUM_EXPERTS)
    x_TD[:, 1:3] = _on_circle(NUM_EXPERTS, shift=0.3).T
    return x_TD


def _on_circle(number, shift=0.0):
    angle = 2 * np.pi * np.arange(number) / number + shift
    return np.stack([np.cos(angle), np.sin(angle)])
