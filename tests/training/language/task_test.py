import keras
import numpy as np
import pytest

from moe_tf import optimizers
from moe_tf.models import layer_specs
from moe_tf.training import loop
from moe_tf.training.language.task import LanguageModelTask
from moe_tf_configs import lm_demo


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, seed_corpus):
    task = LanguageModelTask(lm_demo.get_config("tiny"))
    return task.prepare(str(seed_corpus(tmp_path_factory.mktemp("run"))))


@pytest.mark.parametrize("clip_norm", [None, 2.5])
def test_the_optimizer_is_what_the_config_says(prepared, clip_norm):
    config = lm_demo.get_config("tiny")
    config.train.clip_norm = clip_norm
    config.train.warmup_steps = 4
    scorer = LanguageModelTask(config).build(prepared)
    assert scorer.optimizer.global_clipnorm == clip_norm
    scorer.optimizer.iterations.assign(2)
    rate = float(scorer.optimizer.learning_rate)
    assert rate == pytest.approx(config.train.learning_rate / 2)


@pytest.mark.parametrize(
    "name,kind",
    [
        ("adam", keras.optimizers.Adam),
        ("factored_adam", optimizers.FactoredAdam),
    ],
)
def test_the_dry_run_counts_the_optimizers_state(prepared, name, kind):
    config = lm_demo.get_config("tiny")
    config.train.optimizer = name
    task = LanguageModelTask(config)
    optimizer = task.build(prepared).optimizer
    assert type(optimizer) is kind
    config.data.vocabulary_size = prepared.vocabulary.size
    told = task.dry_run_report().splitlines()
    (line,) = [line for line in told if f"state of {name}" in line]
    # Besides the number of steps and the learning rate.
    slots = [v for v in optimizer.variables if v.shape]
    kibibytes = 4 * sum(np.prod(v.shape) for v in slots) / 1024
    assert line.split()[-2:] == [f"{kibibytes:,.1f}", "KiB"]


@pytest.mark.parametrize(
    "field,value,message",
    [
        ("train.optimizer", "sgd", "`train.optimizer` must be.*=sgd"),
        ("moe.gating", "none", "`gating` must be.*=none"),
        ("moe.gating", "switch", "`k` must be 1.*k=3"),
        ("moe.gating", "expert_choice", "later words.*=expert_choice"),
        ("model.variant", "MoE-2x3-h", "`k` .*k=3"),
        ("data.batch_words", 0, "`data.batch_words`"),
        ("sample.num_sentences", 0, "`sample.num_sentences`"),
        ("dtype_policy", "float31", "`dtype_policy`"),
        ("model.dropout", 1.0, "`model.dropout`"),
        ("seed", -1, "`seed`"),
    ],
)
def test_wrong_choices_are_refused_before_any_work(field, value, message):
    config = lm_demo.get_config("tiny")
    config.moe.k = 3
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=message):
        LanguageModelTask(config)


@pytest.mark.parametrize(
    "field,value",
    [
        ("gating", "switch"),
        ("importance_weight", 0.1),
        ("load_weight", 0.1),
        ("capacity_factor", 1.0),
        ("recompute", True),
    ],
)
def test_settings_of_experts_are_refused_without_experts(field, value):
    config = lm_demo.get_config("tiny")
    config.model.variant = "4xLSTM-512"
    config.moe[field] = value
    with pytest.raises(ValueError, match=f"{field}.*choice of experts"):
        LanguageModelTask(config)


def test_a_field_by_its_former_name_is_refused():
    config = lm_demo.get_config("tiny")
    config.model.gating = "switch"
    with pytest.raises(ValueError, match="`model.gating`.*use `moe.gating`"):
        LanguageModelTask(config)


def test_sizes_of_experts_are_the_configs():
    config = lm_demo.get_config("tiny")
    config.moe.update(num_experts=6, k=3, hidden_units=5, gating="batchwise")
    (layer,) = layer_specs.mixtures(LanguageModelTask(config).variant().layers)
    assert layer == layer_specs.Experts(6, 5, 3, gating="batchwise")


def test_the_dry_run_says_what_is_not_kept():
    config = lm_demo.get_config("tiny")
    told = []
    for config.moe.recompute in (False, True):
        task = LanguageModelTask(config)
        told.append(", not kept" in task.dry_run_report())
    assert told == [False, True]


@pytest.mark.slow
def test_two_levels_with_drops_train_and_are_evaluated_both_ways(
    tmp_path, capsys
):
    config = lm_demo.get_config("tiny")
    config.model.variant = "MoE-4x4-h"
    config.moe.update(capacity_factor=0.5, recompute=True)
    config.train.optimizer = "factored_adam"
    task = LanguageModelTask(config)
    loop.train(task, config, str(tmp_path))
    (trained,) = perplexities_told(capsys.readouterr().out, "test")
    loop.evaluate(task, config, str(tmp_path))
    told = capsys.readouterr().out
    assert "beyond moe.capacity_factor=0.5" in told
    dropless, clipped = perplexities_told(told, "test")
    assert dropless == trained
    assert clipped != dropless


def perplexities_told(text, split):
    return [
        float(line.split()[2])
        for line in text.splitlines()
        if line.startswith(f"{split} perplexity")
    ]


@pytest.mark.parametrize("num_sampled", [None, 32])
@pytest.mark.parametrize("capacity_factor", [None, 0.25])
def test_model_fields_reach_the_layers(prepared, num_sampled, capacity_factor):
    config = lm_demo.get_config("tiny")
    config.model.num_sampled = num_sampled
    config.moe.update(k=2, capacity_factor=capacity_factor)
    task = LanguageModelTask(config)
    scorer = task.build(prepared)
    inputs, _, weights_BL = next(iter(task.batches(prepared, "train")))
    nll_BL = scorer(inputs, training=True)
    balance = scorer.language_model.blocks[1].balance
    assert np.sum(balance.assigned_E) == 2 * np.sum(weights_BL)
    assert (np.sum(balance.dropped_E) > 0) == (capacity_factor is not None)
    # Untrained: near uniform over what the softmax sees.
    mean = float(np.sum(nll_BL * weights_BL) / np.sum(weights_BL))
    assert mean == pytest.approx(
        np.log(1000), rel=0.05 if not num_sampled else 0.5
    )


@pytest.mark.slow
def test_mixed_bfloat16_scores_as_float32_does(prepared):
    perplexities = []
    for policy in ("float32", "mixed_bfloat16"):
        keras.utils.set_random_seed(0)
        keras.config.set_dtype_policy(policy)
        try:
            config = lm_demo.get_config("tiny")
            task = LanguageModelTask(config)
            scorer = task.build(prepared)
            scorer.fit(
                task.batches(prepared, "train"), steps_per_epoch=100, verbose=0
            )
            perplexities.append(
                scorer.evaluate(
                    task.batches(prepared, "validation"),
                    verbose=0,
                    return_dict=True,
                )["perplexity"]
            )
        finally:
            keras.config.set_dtype_policy("float32")
    assert perplexities[0] < 700  # it has learned something
    assert perplexities[1] == pytest.approx(perplexities[0], rel=0.05)
