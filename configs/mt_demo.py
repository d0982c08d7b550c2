"""The help of LibreOffice, English to French, at a small size.

    moe-tf-mt --config=configs/mt_demo.py --workdir=runs/mt
    echo 'Click the button to open the dialog.' | \
        moe-tf-mt --config=configs/mt_demo.py --workdir=runs/mt --mode=translate

After the colon: a variant at a quarter of its width (`Transformer-MoE-8` by
default; `Transformer`, `GNMT`, `GNMT-wide`, `GNMT-MoE-32`, any `GNMT-MoE-<n>`,
`GNMT-MoE-<a>x<b>-h`, `GNMT-multi-<n>`), or `tiny` for seconds. The text comes
from Debian's packages, which `apt-get download` fetches, to the workdir.
"""

import ml_collections
from ml_collections import config_dict


def get_config(arg="Transformer-MoE-8"):
    tiny = arg == "tiny"
    variant = "Transformer-MoE-4" if tiny else arg
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
        # at the start of the source names the one that is wanted.
        "pairs": "en-de" if tiny else "en-fr",
        # Most wordpieces, learned from both sides, and symbols.
        "vocabulary_size": 500 if tiny else 4000,
        # Longer sentences are left out of training, and counted.
        "max_pieces": 32 if tiny else 64,
        # Wordpieces a batch and side, padding included; a multiple of 384
        # gives all batches equally many.
        "batch_tokens": 384 if tiny else 1536,
        # Divides the number of sentences of every batch.
        "rows_multiple": config_dict.placeholder(int),
    }
    config.model = {
        "variant": variant,
        # Sizes; None: the variant's own.
        "width": 16 if tiny else 128,
        "encoder_layers": config_dict.placeholder(int),
        "decoder_layers": config_dict.placeholder(int),
        # Of experts: how many a word gets, and their hidden width.
        "k": config_dict.placeholder(int),
        "expert_hidden": config_dict.placeholder(int),
        # Of Transformers. Experts stand in each `moe_every`-th block.
        "num_heads": config_dict.placeholder(int),
        "feed_forward": config_dict.placeholder(int),
        "moe_every": config_dict.placeholder(int),
        "tie_embeddings": config_dict.placeholder(bool),
        # Of GNMT: cells of each LSTM, whether the lowest reads both ways,
        # width and form of the attention: "product" (equation 22) or "sum".
        "cells": config_dict.placeholder(int),
        "bidirectional": config_dict.placeholder(bool),
        "attention_units": config_dict.placeholder(int),
        "attention_form": config_dict.placeholder(str),
        "dropout": 0.1,
        # "noisy_top_k", "softmax_top_k", "switch" or "batchwise".
        "gating": "noisy_top_k",
        # Weights of the balancing losses; None: the router's own, 0.1 and
        # 0.1 for noisy_top_k.
        "importance_weight": config_dict.placeholder(float),
        "load_weight": config_dict.placeholder(float),
        # None: every chosen expert computes every token.
        "capacity_factor": config_dict.placeholder(float),
        # Parts of a batch that are routed apart; see `lm_demo.py`.
        "num_groups": config_dict.placeholder(int),
        # Hidden activations of experts are computed again in the backward
        # pass instead of kept.
        "recompute": False,
    }
    if variant.startswith("Transformer"):
        config.model.encoder_layers = 2 if tiny else 3
        config.model.decoder_layers = 2
        config.model.num_heads = 2 if tiny else 4
        config.model.feed_forward = 32 if tiny else 256
    config.train = {
        "steps": 2 if tiny else 1200,
        # "adam", or "factored_adam": state of under 1 % of an expert's bytes.
        "optimizer": "adam",
        "beta_2": 0.98,
        # Its rate: up to here in `warmup_steps`, constant for
        # `constant_steps`, then ~ 1 / sqrt(step).
        "learning_rate": 3e-3,
        "warmup_steps": 1 if tiny else 300,
        "constant_steps": 0,
        # Share of the probability that is spread over all wordpieces.
        "label_smoothing": 0.1,
        # Largest norm of the whole gradient; None: not clipped.
        "clip_norm": config_dict.placeholder(float),
        # Steps between evaluations; the state is saved at each.
        "evaluate_every": 1 if tiny else 400,
        # Steps between two points in TensorBoard.
        "log_every": 1 if tiny else 50,
        # Last states kept, besides the best one; `--mode=average` takes the
        # mean of their weights.
        "keep_checkpoints": 3,
        # Whether XLA compiles the whole step, for each length of batches.
        "jit_compile": False,
    }
    config.train.clip_norm = 1.0
    config.translate = {
        # Whose weights translate: "best", "last" or "average".
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
        # Most pieces for each of the source; 10 are added.
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
        # at every evaluation, and how many of them are shown.
        "validation_sentences": 4 if tiny else 100,
        "shown": 3,
    }
    config.translate.pruning = 3.0
    config.experts = {
        # For `--mode=experts`: the layer ("" is the first), the experts (""
        # are the most specialised), and how many places of each.
        "layer": "",
        "experts": "",
        "num_experts": 8,
        "places": 10,
        # Sentences of the test text, of each pair, that are looked at.
        "sentences": 500,
    }
    return config
