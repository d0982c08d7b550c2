import json
import warnings

import pytest

from moe_tf.distribute import collectives
from moe_tf.models import layer_specs
from moe_tf.routing import two_level
from moe_tf.training import communication
from moe_tf.training import meshes
from moe_tf.training import workdir as workdirs
from moe_tf.training.language import dry_run
from moe_tf.training.language.task import LanguageModelTask
from moe_tf.training.translation.task import TranslationTask
from moe_tf_configs import lm_demo
from moe_tf_configs import mt_demo
from tests import process
from tests import sets


def config_with(fields):
    config = lm_demo.get_config("tiny")
    config.update_from_flattened_dict(fields)
    return config


@pytest.mark.parametrize(
    "batch,expert,axes",
    [
        (None, None, None),
        (4, None, {"batch": 4}),
        (2, 2, {"batch": 2, "expert": 2}),
        (None, 2, {"batch": 1, "expert": 2}),
        (1, None, {"batch": 1}),
    ],
)
def test_axes(batch, expert, axes):
    fields = {"mesh.batch": batch, "mesh.expert": expert}
    assert meshes.mesh_axes(config_with(fields)) == axes


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"mesh.batch": 0}, "`mesh.batch`.*=0"),
        ({"mesh.expert": -1}, "`mesh.expert`.*=-1"),
        ({"moe.num_groups": 0}, "`moe.num_groups`.*=0"),
        ({"data.rows_multiple": 0}, "`data.rows_multiple`.*=0"),
        ({"mesh.batch": 3}, "`mesh.batch` must divide.*data.rows_multiple"),
        (
            {"mesh.batch": 4, "data.rows_multiple": 6},
            "4 or 8 would do, or mesh.batch=3 or 6..*mesh.batch=4, "
            "data.rows_multiple=6",
        ),
        (
            {"mesh.batch": 4, "moe.num_groups": 2},
            "mesh.batch=4, moe.num_groups=2",
        ),
        ({"moe.num_groups": 3}, "moe.num_groups=3, data.rows_multiple=8"),
        ({"mesh.batch": 8}, "`mesh.batch` must divide.*experts=4"),
        ({"mesh.expert": 3}, "`mesh.expert` must divide.*experts=4"),
        (
            {"mesh.expert": 2, "model.variant": "4xLSTM-512"},
            "`mesh.expert` is for variants with a choice of experts",
        ),
        (
            {"moe.num_groups": 2, "model.variant": "4xLSTM-512"},
            "num_groups.*choice of experts",
        ),
    ],
)
def test_what_does_not_divide_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        LanguageModelTask(config_with(fields))


@pytest.mark.parametrize(
    "fields,rows",
    [
        ({}, None),
        ({"mesh.batch": 2}, 8),
        ({"mesh.batch": 4}, 8),
        ({"moe.num_groups": 2}, 8),
        ({"mesh.batch": 2, "data.rows_multiple": 4}, 4),
        ({"data.rows_multiple": 4}, 4),
    ],
)
def test_rows_do_not_depend_on_the_mesh(fields, rows):
    config = config_with(fields)
    LanguageModelTask(config)
    assert config.data.rows_multiple == rows


DROPPING, CHOOSING = (
    {"moe.capacity_factor": 1.0},
    {"moe.gating": "batchwise"},
)


@pytest.mark.parametrize(
    "fields,number",
    [
        ({"mesh.batch": 2}, None),
        (DROPPING, None),
        ({"mesh.batch": 2, **DROPPING}, 8),
        ({"mesh.batch": 4, **CHOOSING}, 8),
        ({"mesh.batch": 4, **DROPPING, "data.rows_multiple": 4}, 4),
        ({"mesh.batch": 2, **CHOOSING, "moe.num_groups": 2}, 2),
    ],
)
def test_groups_do_not_depend_on_the_mesh(fields, number):
    config = config_with(fields)
    LanguageModelTask(config)
    assert config.moe.num_groups == number


def test_the_mesh_may_change_and_groups_may_not(tmp_path):
    config = config_with({"mesh.batch": 4, "moe.num_groups": 4})
    free = LanguageModelTask(config).free_fields
    with workdirs.claim_workdir(tmp_path, config, free) as claim:
        claim.record()
    config.mesh.batch, config.mesh.expert = 2, 2
    workdirs.check_workdir(tmp_path, config, free)
    config.moe.num_groups = 2
    with pytest.raises(ValueError, match="moe.num_groups: 4 in the workdir"):
        workdirs.check_workdir(tmp_path, config, free)


def test_a_run_from_before_a_field_was_there_goes_on(tmp_path):
    config = lm_demo.get_config("tiny")
    with workdirs.claim_workdir(tmp_path, config) as claim:
        claim.record()
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    del fields["mesh"], fields["moe"]["num_groups"]
    path.write_text(json.dumps(fields))
    workdirs.check_workdir(tmp_path, config)
    config.moe.num_groups = 2
    with pytest.raises(ValueError, match="num_groups: missing.*2 now"):
        workdirs.check_workdir(tmp_path, config)


def test_the_dry_run_tells_what_devices_hold():
    config = config_with({"mesh.batch": 2, "mesh.expert": 4})
    task = LanguageModelTask(config)
    told = task.dry_run_report()
    assert "batch 2, expert 4, 8 devices" in told
    # Experts (4, 16, 32) twice, of which each has one of four; the rest:
    # tables of 1000 words, two LSTMs, two gates.
    whole = 2 * 1000 * 16 + 2 * 8 * 16**2 + 2 * 16 * 4
    kibibytes = 4 * (whole + 2 * 16 * 32) / 1024
    (line,) = [line for line in told.splitlines() if "each holds" in line]
    assert line.split()[-2:] == [f"{kibibytes:,.1f}", "KiB"]
    # Of 2 * 8 * 16^2 + 2 * 16 * 4 + 4 * 2 * 16 * 32 operations.
    assert "all but experts: 51%" in told


def test_the_dry_run_needs_no_mesh_to_be_there():
    config = config_with({"mesh.expert": 512, "model.variant": "MoE-512"})
    config.moe.k = 4
    task = LanguageModelTask(config)
    assert "512 devices" in task.dry_run_report()


def two_levels_of_translation(fields):
    config = mt_demo.get_config("GNMT-MoE-2x2-h")
    config.update_from_flattened_dict(fields)
    return TranslationTask(config)


def two_levels_of_words(fields):
    return LanguageModelTask(
        config_with({"model.variant": "MoE-2x2-h", **fields})
    )


@pytest.mark.parametrize(
    "make,number",
    [(two_levels_of_words, 1), (two_levels_of_translation, 2)],
)
@pytest.mark.parametrize(
    "axes,whole",
    [
        ({"batch": 2}, True),
        ({"batch": 4}, False),
        ({"batch": 4, "expert": 2}, True),
        ({"batch": 2, "expert": 4}, False),
    ],
)
def test_the_dry_run_tells_of_split_branches(make, number, axes, whole):
    fields = {f"mesh.{axis}": size for axis, size in axes.items()}
    told = make({"moe.k": 1, **fields}).dry_run_report()
    assert told.count("branches of experts") == (0 if whole else number)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        two_level.warn_of_split_branches("moe", (2, 2), axes)
    # Once built, the layer warns in the same words.
    words = [str(w.message).partition(" layer moe are ")[2] for w in caught]
    assert len(words) == (not whole)
    for text in words:
        assert told.count(text) == number


DENSE = {"mesh.batch": 4, "model.variant": "4xLSTM-512"}
DROPS = {"moe.k": 2, "moe.capacity_factor": 1.25, "moe.num_groups": 4}
SENT = {
    "dense": DENSE,
    "one axis": {"mesh.batch": 4, **DROPS},
    "two axes": {"mesh.batch": 2, "mesh.expert": 2, **DROPS},
}


def what_a_step_sends(workdir):
    """By name: the collectives, and what the dry run tells of them."""
    found = {}
    for name, fields in SENT.items():
        config = config_with({"data.max_words": 7, **fields})
        task = LanguageModelTask(config, meshes.make_strategy(config))
        prepared = task.prepare(workdir)
        config.data.vocabulary_size = prepared.vocabulary.size
        scorer = task.build(prepared)
        inputs, targets, weights = next(iter(task.batches(prepared, "train")))
        assert targets.shape == (32, 8)  # as many words as may be in a batch
        ops = collectives.list_collectives(
            scorer.train_on_batch, inputs, targets, weights
        )
        axes, variant = meshes.mesh_axes(config), task.variant()
        told = dry_run.gradient_bytes(variant, config, axes) + sum(
            communication.token_bytes_sent(
                layer, variant.width, config.data.batch_words, config, axes
            )
            for layer in layer_specs.mixtures(variant.layers)
        )
        found[name] = ops, told
    return found


@pytest.fixture(scope="module")
def sent(tmp_path_factory, seed_corpus):
    workdir = seed_corpus(tmp_path_factory.mktemp("run"))
    return process.run(what_a_step_sends, str(workdir))


@pytest.mark.parametrize("name", map(sets.thorough, SENT))
def test_the_dry_run_tells_what_is_sent(sent, name):
    found, told = sent[name]
    size = SENT[name]["mesh.batch"]  # and of `expert`, where there is one
    factor = {
        "all-reduce": 2 * (size - 1) / size,
        "all-gather": (size - 1) / size,
        "all-to-all": (size - 1) / size,
    }
    # Besides: metrics and statistics of experts; ids of the words, twice.
    large = [op for op in found if op.bytes > 32]
    ids = [op for op in large if op.shape in ((32, 8), (256,))]
    large = [op for op in large if op not in ids]
    assert sum(factor[op.kind] * op.bytes for op in large) == told
    assert len(ids) == 2
    if name == "dense":
        # One reduction for each kernel, whatever the length; none of tables.
        assert sorted(op.shape for op in large) == sorted(
            [(16, 64)] * 8 + [(16, 32), (256, 16), (32, 8, 16)]
        )
