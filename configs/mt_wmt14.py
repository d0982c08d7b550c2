"""WMT'14 with the paper's translation models (section 5.3, appendix E).

    moe-tf-mt --config=mt_wmt14:GNMT-MoE-2048-h --workdir=runs/wmt

After the colon, with the paper's test perplexity and BLEU on newstest2014
(tables 2 and 3): `GNMT-MoE-2048-h`, English to French 2.63 and 40.56 (six
days on 64 GPUs), English to German 4.64 and 26.03; `GNMT-MoE-512-h`,
`GNMT-MoE-32`, `GNMT`; or `tiny` for seconds. The text is that of
tensorflow_datasets (the extra `tfds`). Not rerun here: the text is in no
package. The paper leaves open the peak of the learning rate, the split of
the experts, how its strictly balanced gating is done in two levels (see
`HierarchicalBatchwiseRouter`), and the width of the attention.
"""

from moe_tf_configs import mt_demo


def get_config(arg="GNMT-MoE-2048-h"):
    if arg == "tiny":
        return mt_demo.get_config("tiny")
    config = mt_demo.get_config(arg)
    config.data.corpus = "tfds:wmt14_translate/fr-en"
    config.data.pairs = "en-fr"
    config.data.vocabulary_size = 32_000
    config.data.max_pieces = 128
    # "About 16,000 words a GPU"; of 64 of them.
    config.data.batch_tokens = 64 * 16_128
    config.model.width = 512
    config.model.dropout = 0.4
    if "MoE" in arg:
        # In two levels too; how the paper composes them is unknown.
        config.moe.gating = "batchwise"
        config.moe.importance_weight = 0.01
    if "multi" in arg:
        config.moe.importance_weight = 0.01
        config.moe.load_weight = 0.01
    config.train.steps = 100_000
    config.train.learning_rate = 1e-3
    config.train.warmup_steps = 2000
    config.train.constant_steps = 8000
    config.train.beta_2 = 0.999
    config.train.label_smoothing = 0.0
    config.train.evaluate_every = 2000
    config.translate.beam_size = 8
    return config
