"""One Billion Words with the paper's 8M-ops models (section 5.1, appendix C).

    moe-tf-lm --config=lm1b_moe:MoE-256 --workdir=runs/moe_256 \
        --config.data.path=1-billion-word-language-modeling-benchmark-r13output

After the colon, with the paper's test perplexity after 10 epochs (table 7):
`4xLSTM-512` 46.0, `LSTM-2048-512` 44.7, `MoE-1-Wide` 46.1, `MoE-1-Deep` 45.7,
`MoE-4` 45.0, `MoE-32` 39.7, `MoE-256` 35.7, `MoE-256-h` 36.0, `MoE-1024-h`
34.6, `MoE-4096-h` 34.1, `MoE-34M` 31.3, `MoE-143M` 28.0 (the last four with
dropout 0.2, 0.2, 0.3, 0.4); or `tiny` for seconds (it needs the text too).
Not rerun here: the text is in no package.
"""

from moe_tf_configs import lm_demo


def get_config(arg="MoE-256"):
    config = lm_demo.get_config(arg)
    # The folder `data.path`; or "tfds:lm1b".
    config.data.corpus = "lm1b"
    config.data.shuffle_buffer = 1_000_000
    # Unknown in the paper.
    config.train.learning_rate = 1e-3
    # Unknown in the paper; Jozefowicz et al. 2016 clip at 1.
    config.train.clip_norm = 1.0
    if arg == "tiny":
        return config
    # The benchmark's vocabulary, and room for the padding.
    config.data.vocabulary_size = 793_472
    # "About 300,000 words"; padding is counted in here.
    config.data.batch_words = 300_000
    # The variant's own: the paper's.
    config.model.width = None
    # Unknown in the paper; 8192 in Jozefowicz et al. 2016.
    config.model.num_sampled = 8192
    # 10 epochs.
    config.train.steps = 27_000
    config.train.warmup_steps = 1000
    config.train.evaluate_every = 1000
    config.train.log_every = 100
    return config
