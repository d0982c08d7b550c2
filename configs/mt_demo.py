"""The help of LibreOffice, English to French, at a small size.

    moe-tf-mt --config=mt_demo --workdir=runs/mt
    echo 'Click the button to open the dialog.' | \
        moe-tf-mt --config=mt_demo --workdir=runs/mt --mode=translate

After the colon: a variant at a quarter of its width (`Transformer-MoE-8` by
default; `Transformer`, `GNMT`, `GNMT-wide`, `GNMT-MoE-32`, any `GNMT-MoE-<n>`,
`GNMT-MoE-<a>x<b>-h`, `GNMT-multi-<n>`), or `tiny` for seconds. The text comes
from Debian's packages, which `apt-get download` fetches, to the workdir.
"""

from ml_collections import config_dict

from moe_tf_configs import base


def get_config(arg="Transformer-MoE-8"):
    tiny = arg == "tiny"
    config = base.make_config(tiny)
    config.data = _data(tiny)
    config.model = _model(tiny, "Transformer-MoE-4" if tiny else arg)
    config.train.update(_train())
    if not tiny:
        config.train.steps = 1200
        config.train.warmup_steps = 300
        config.train.evaluate_every = 400
    config.translate = _translate(tiny)
    config.translate.pruning = 3.0
    config.experts = _experts()
    return config


def _data(tiny):
    return {
        # "libreoffice-help", "files" or "tfds:wmt14_translate/fr-en".
        "corpus": "libreoffice-help",
        # The folder of a named corpus; empty: made from packages.
        "path": "",
        # With "files": one pattern a split, plain text or .gz, in which
        # {lang} stands for a language and {pair} for a pair such as en-de.
        "train": "",
        "validation": "",
        "test": "",
        # Source and target, comma separated; "en-de:2,en-fr:1" draws twice as
        # many sentences of the first. Several targets: a symbol such as <2de>
        # at the start of the source names the target language.
        "pairs": "en-de" if tiny else "en-fr",
        # Wordpieces at most, learned from both sides, and symbols.
        "vocabulary_size": 500 if tiny else 4000,
        # Longer sentences are left out of training, and counted.
        "max_pieces": 32 if tiny else 64,
        # Wordpieces a batch and side, padding included; with a multiple of
        # 384, all batches have equally many.
        "batch_tokens": 384 if tiny else 1536,
        # Divides the number of sentences of every batch.
        "rows_multiple": config_dict.placeholder(int),
    }


def _model(tiny, variant):
    """Fields of the model besides its experts, which are `config.moe`."""
    model = {
        "variant": variant,
        # Sizes; None: the variant's own.
        "width": 16 if tiny else 128,
        "encoder_layers": config_dict.placeholder(int),
        "decoder_layers": config_dict.placeholder(int),
        # Of Transformers. Experts stand in each `moe_every`-th block.
        "num_heads": config_dict.placeholder(int),
        "feed_forward": config_dict.placeholder(int),
        "moe_every": config_dict.placeholder(int),
        "tie_embeddings": config_dict.placeholder(bool),
        # Of GNMT: cells of each LSTM, whether the lowest layer reads both
        # ways, width and form of the attention: "product" (equation 22) or
        # "sum".
        "cells": config_dict.placeholder(int),
        "bidirectional": config_dict.placeholder(bool),
        "attention_units": config_dict.placeholder(int),
        "attention_form": config_dict.placeholder(str),
        "dropout": 0.1,
    }
    if variant.startswith("Transformer"):
        model["encoder_layers"] = 2 if tiny else 3
        model["decoder_layers"] = 2
        model["num_heads"] = 2 if tiny else 4
        model["feed_forward"] = 32 if tiny else 256
    return model


def _train():
    """Fields of `config.train` besides those of the language model."""
    return {
        "beta_2": 0.98,
        "learning_rate": 3e-3,
        # Steps after the warm-up in which the learning rate stays.
        "constant_steps": 0,
        # Probability that is spread evenly over all wordpieces.
        "label_smoothing": 0.1,
        "clip_norm": 1.0,
        # `--mode=average` takes the mean of their weights.
        "keep_checkpoints": 3,
        # Whether XLA compiles the whole step, for each length of batches.
        "jit_compile": False,
    }


def _translate(tiny):
    return {
        # The checkpoint that translates: "best", "last" or "average".
        "checkpoint": "best",
        # The pair of `--mode=translate` and `score`; empty: the first.
        "pair": "",
        # Text files to translate, comma separated; empty: standard input.
        "input": "",
        # "text": the translation, or with several `num_best` lines of
        # number, score and translation; "json": scores and attention too.
        "output": "text",
        # "beam", "greedy" or "sample".
        "method": "beam",
        "beam_size": 2 if tiny else 4,
        "num_best": 1,
        # GNMT's alpha and beta, and its pruning; None: nothing is pruned.
        "length_penalty": 0.2,
        "coverage_penalty": 0.2,
        "pruning": config_dict.placeholder(float),
        # Wordpieces of a translation for each of the source, at most; 10 are
        # added.
        "max_length_ratio": 1.0 if tiny else 2.0,
        # Of "sample".
        "temperature": 1.0,
        "seed": 0,
        # Sentences translated together, and the longest that is translated.
        "batch_size": 16 if tiny else 64,
        "max_pieces": 256,
        # How sacrebleu cuts into words: "13a", or "none" for text that is
        # tokenised already.
        "bleu_tokenize": "13a",
        # Validation sentences of each pair that are translated, greedily,
        # at every evaluation, and how many of these are shown.
        "validation_sentences": 4 if tiny else 100,
        "shown": 3,
    }


def _experts():
    """What `--mode=experts` reports."""
    return {
        # The layer ("" is the first), the experts ("" are the most
        # specialised), and how many places of each.
        "layer": "",
        "experts": "",
        "num_experts": 8,
        "places": 10,
        # Sentences of the test text, of each pair, that are read.
        "sentences": 500,
    }
