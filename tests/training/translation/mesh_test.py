"""Translation on meshes: as on one device, and sending what was told."""

import functools

import keras
import pytest

from moe_tf.distribute import collectives
from moe_tf.models import layer_specs
from moe_tf.training import communication
from moe_tf.training import meshes
from moe_tf.training.translation import dry_run
from moe_tf.training.translation.task import TranslationTask
from tests import process
from tests import small_text
from tests.configs import configs_test

TWO, FOUR = {"batch": 2}, {"batch": 4}
SQUARE = {"batch": 2, "expert": 2}
DROPS = {"num_groups": 4, "capacity_factor": 1.0}
SMALL = {"encoder_layers": 1, "decoder_layers": 1}
GNMT = {"num_heads": None, "feed_forward": None, "encoder_layers": 2}
BATCHWISE = {**GNMT, "gating": "batchwise", "num_groups": 4}
# Mesh and fields of the model. Four experts each, so that statistics of them
# are known by their shape.
QUICK = {
    "Transformer": (TWO, {**SMALL, **DROPS, "moe_every": 1}),
}
SLOW = {
    "two levels": (
        SQUARE,
        {"variant": "GNMT-MoE-2x2-h", "k": 1, **BATCHWISE},
    ),
    "flat": (SQUARE, {"variant": "GNMT-MoE-4", "k": 2, **GNMT, **DROPS}),
    "batchwise": (FOUR, {"variant": "GNMT-MoE-4", "k": 2, **BATCHWISE}),
    "both ways": (
        FOUR,
        {
            "variant": "GNMT-multi-4",
            "bidirectional": True,
            "attention_form": "sum",
            **GNMT,
        },
    ),
    "untied": (SQUARE, {**DROPS, "tie_embeddings": False}),
    "dense": (TWO, {"variant": "Transformer", **SMALL}),
    "dense GNMT": (FOUR, {"variant": "GNMT", **GNMT}),
}
CASES = {**QUICK, **SLOW}
NAMES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
# Besides weights and activations: ids of the words, which are integers, and
# losses and statistics of the four experts.
STATISTICS = ((), (4,))


def config_of(name, data):
    config = configs_test.config_of("mt_demo", "tiny")
    # So many pieces that all sentences are of one length, 12.
    config.data.update(data, vocabulary_size=250, rows_multiple=8)
    for field, value in CASES[name][1].items():
        group = config.moe if field in config.moe else config.model
        group[field] = value
    return config


def train(names, data, workdir, on_mesh):
    """By name: what is told of three steps and of the test text, and sent."""
    found = {}
    for name in names:
        config = config_of(name, data)
        if on_mesh:
            config.mesh.update(CASES[name][0])
        keras.backend.clear_session()
        keras.utils.set_random_seed(config.seed)
        task = TranslationTask(config, meshes.make_strategy(config))
        prepared = task.prepare(workdir)
        scorer = task.build(prepared)
        fit = functools.partial(
            scorer.fit,
            task.batches(prepared, "train"),
            steps_per_epoch=3,
            verbose=0,
        )
        ops = collectives.list_collectives(fit)
        test = scorer.evaluate(
            task.batches(prepared, "test"),
            steps=task.num_batches(prepared, "test"),
            return_dict=True,
            verbose=0,
        )
        steps = {key: value for key, (value,) in scorer.history.history.items()}
        found[name] = steps, test, ops
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("translation")
    data = small_text.write(folder)

    @functools.cache
    def all_of(names, on_mesh):
        args = names, data, str(folder / "run"), on_mesh
        return process.run(train, *args, timeout=900)

    def run(name, on_mesh):
        names = tuple(QUICK if name in QUICK else SLOW)
        return all_of(names, on_mesh)[name]

    return run


@pytest.mark.thorough
@pytest.mark.parametrize("name", NAMES)
def test_equals_one_device(runs, name):
    got, want = (runs(name, on_mesh) for on_mesh in (True, False))
    for found, expected in zip(got[:2], want[:2], strict=True):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
    assert got[1]["words"] > 150


@pytest.mark.thorough
@pytest.mark.parametrize("name", NAMES)
def test_the_dry_run_tells_what_is_sent(runs, name):
    *_, ops = runs(name, True)
    size = CASES[name][0]["batch"]  # and of `expert`, where there is one
    factor = {
        "all-reduce": 2 * (size - 1) / size,
        "all-gather": (size - 1) / size,
        "all-to-all": (size - 1) / size,
    }
    sent = sum(
        factor[op.kind] * op.bytes
        for op in ops
        if "int" not in op.dtype and op.shape not in STATISTICS
    )
    assert sent == told(name)


def told(name):
    config = config_of(name, {})
    config.mesh.update(CASES[name][0])
    axes, variant = meshes.mesh_axes(config), TranslationTask(config).variant()
    return dry_run.gradient_bytes(variant, config, axes) + sum(
        communication.token_bytes_sent(
            layer, variant.width, config.data.batch_tokens, config, axes
        )
        for layer in layer_specs.mixtures(variant.layers)
    )
