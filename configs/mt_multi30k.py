"""Multi30k, English to German: the published Transformer, and with experts.

    moe-tf-mt --config=mt_multi30k --workdir=runs/multi30k \
        --config.data.path=multi30k/tok

`data.path` is the folder of the tokenised text (`train.lc.norm.tok.en.gz`
...). After the colon: `Transformer` (Transformer-Tiny of Wu et al., ACL 2021,
41.02 BLEU on test2016), `Transformer-MoE-8`, `GNMT-wide`, `GNMT-MoE-32` or any
other variant. Then `--mode=average`, and
`--mode=evaluate --config.translate.checkpoint=average`.
"""

from moe_tf_configs import mt_demo


def get_config(arg="Transformer"):
    if arg == "tiny":
        return mt_demo.get_config("tiny")
    config = mt_demo.get_config(arg)
    config.data.pairs = "en-de"
    config.data.corpus = "files"
    name = "{path}/%s.lc.norm.tok.{lang}.gz"
    config.data.train = name % "train"
    config.data.validation = name % "val"
    config.data.test = name % "test_2016_flickr"
    config.data.vocabulary_size = 10_000
    config.data.max_pieces = 128
    # 4,096 words a batch on each of two GPUs.
    config.data.batch_tokens = 8448
    config.model.dropout = 0.3
    config.model.width = 128
    if arg.startswith("Transformer"):
        config.model.encoder_layers = 4
        config.model.decoder_layers = 4
        config.model.num_heads = 4
        config.model.feed_forward = 256
    config.train.steps = 8000
    config.train.learning_rate = 5e-3
    config.train.warmup_steps = 2000
    if arg.startswith("GNMT"):
        config.model.dropout = 0.2
        # GNMT's own; with the paper's, attention is found later.
        config.model.attention_form = "sum"
        config.train.steps = 2000
        config.train.learning_rate = 4e-3
        config.train.warmup_steps = 400
    config.train.evaluate_every = 200
    config.train.keep_checkpoints = 10
    config.translate.beam_size = 5
    config.translate.bleu_tokenize = "none"
    config.translate.validation_sentences = 200
    return config
