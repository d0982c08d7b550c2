"""LibreOffice's help from English to ten languages, one model (section 5.4).

    moe-tf-mt --config=mt_libreoffice:MoE --workdir=runs/many
    moe-tf-mt --config=mt_libreoffice:dense --workdir=runs/dense
    moe-tf-mt --config=mt_libreoffice:dense --workdir=runs/en-de \
        --config.data.pairs=en-de

After the colon: `MoE`, 32 experts of which each word gets two, or `dense`,
with as many operations a word; or `tiny`, two pairs for seconds. As the
paper's multilingual model has flat experts, noisy top-k gating and k = 2. The
text comes from Debian's packages, or lies in `data.path`.
"""

from moe_tf_configs import mt_demo

_LANGUAGES = ("de", "fr", "it", "pt-BR", "nl", "cs", "sl", "da", "el", "es")
_VARIANTS = {"MoE": "Transformer-MoE-32", "dense": "Transformer"}


def get_config(arg="MoE"):
    if arg == "tiny":
        config = mt_demo.get_config("tiny")
        config.data.pairs = "en-de,en-fr"
        return config
    config = mt_demo.get_config(_VARIANTS[arg])
    config.data.pairs = ",".join(f"en-{target}" for target in _LANGUAGES)
    config.data.vocabulary_size = 16_000
    config.data.max_pieces = 96
    config.data.batch_tokens = 8448
    config.model.width = 256
    config.model.feed_forward = 1024
    config.model.encoder_layers = 4
    config.model.decoder_layers = 4
    config.train.steps = 8000
    config.train.learning_rate = 2e-3
    config.train.warmup_steps = 1000
    config.train.evaluate_every = 1000
    config.translate.validation_sentences = 50
    return config
