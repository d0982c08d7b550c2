"""Fields that the experiments of both trainers have; not an experiment.

`lm_demo` and `mt_demo` build on this config. `config.moe` holds the settings
of the mixture-of-experts layers.
"""

import ml_collections
from ml_collections import config_dict


def make_config(tiny: bool = False) -> ml_collections.ConfigDict:
    """Makes the common fields; with `tiny`, two steps of training."""
    config = ml_collections.ConfigDict()
    # Decides initial weights, noise, dropout and the order of the data.
    config.seed = 0
    # A name of Keras's, such as "mixed_bfloat16".
    config.dtype_policy = "float32"
    config.mesh = _mesh()
    config.moe = _moe()
    config.train = _train(tiny)
    return config


def _mesh():
    """Devices that train together; None in both: one device, no mesh.

    The mesh decides no weight: a run may continue on another mesh.
    """
    return {
        # Each of these devices has its part of every batch. It also has its
        # part of the experts if `expert` is None.
        "batch": config_dict.placeholder(int),
        # Experts are sharded over these devices; all other work is repeated
        # by each of them.
        "expert": config_dict.placeholder(int),
    }


def _moe():
    """Settings of the layers of experts, for variants that have some."""
    return {
        # Experts of a layer; None: as many as the variant's name says.
        "num_experts": config_dict.placeholder(int),
        # Experts that compute a word; with two levels, branches for a word
        # and experts in each. None: the variant's own.
        "k": config_dict.placeholder(int),
        # Width of each expert's hidden layer; None: the variant's own.
        "hidden_units": config_dict.placeholder(int),
        # The router: "noisy_top_k", "softmax_top_k", "switch" or "batchwise".
        "gating": "noisy_top_k",
        # Weights of the balancing losses; None: the router's own, for
        # noisy_top_k the paper's 0.1 and 0.1.
        "importance_weight": config_dict.placeholder(float),
        "load_weight": config_dict.placeholder(float),
        # Slots of an expert in training, as a multiple of its even share of
        # the words; None: every chosen expert computes every word.
        "capacity_factor": config_dict.placeholder(float),
        # Token groups of a batch, each with a capacity of its own: a multiple
        # of `mesh.batch`. On a mesh where words may be dropped, or with
        # batchwise gating, None becomes `data.rows_multiple`.
        "num_groups": config_dict.placeholder(int),
        # Whether hidden activations of experts are computed again in the
        # backward pass instead of being kept.
        "recompute": False,
    }


def _train(tiny):
    required = config_dict.required_placeholder
    return {
        "steps": 2 if tiny else required(int),
        # "adam", or "factored_adam", whose state takes under 1 % of an
        # expert's bytes.
        "optimizer": "adam",
        # The peak of the learning rate, reached after `warmup_steps`; then
        # the rate falls as 1 / sqrt(step).
        "learning_rate": required(float),
        "warmup_steps": 1 if tiny else required(int),
        # Largest norm of the whole gradient; None: not clipped.
        "clip_norm": config_dict.placeholder(float),
        # Steps between evaluations; a checkpoint is saved at each.
        "evaluate_every": 1 if tiny else required(int),
        # Steps between two points in TensorBoard.
        "log_every": 1 if tiny else 50,
        # Last checkpoints that are kept, besides the best one.
        "keep_checkpoints": 2,
    }
