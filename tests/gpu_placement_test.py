"""What runs op by op on a GPU stays there and gives what it gives elsewhere."""

import numpy as np
import pytest
import tensorflow as tf

from moe_tf import xla
from moe_tf.benchmarks import mesh_text
from moe_tf.dispatch import plans
from moe_tf.distribute import MeshStrategy
from moe_tf.layers.softmax import vocabulary_chunks
from tests import every_router
from tests import process
from tests import sets
from tests.experts import gpu_kernels

WORDS = 512  # Of a batch.


def as_if_on_gpu():
    xla.runs_ops_on_gpu = lambda: not xla.wants_static_shapes()


def language_model(gpu, folder):
    """What a step on a mesh leaves to the host of a GPU; losses and weights."""
    if gpu:
        as_if_on_gpu()
    strategy, found = MeshStrategy({"batch": 2}), []
    prepared = mesh_text.prepare_text(folder)
    batches = mesh_text.read_batches(prepared, 3, WORDS)

    def train():
        setting = mesh_text.Setting(steps=3)
        size = prepared.vocabulary.size
        found.append(mesh_text.train_model(strategy, setting, batches, size))

    on_host = gpu_kernels.on_host(train)
    return on_host + gpu_kernels.on_host(whole_softmax, strategy), *found


def whole_softmax(strategy):
    """The softmax of translation, and its gradients."""

    def gradients(x_TD, targets_T):
        kernel_VD = tf.zeros((20, 8))
        with tf.GradientTape() as tape:
            tape.watch(x_TD)
            nll_T = vocabulary_chunks.full_nll(x_TD, kernel_VD, targets_T)
        return tape.gradient(nll_T, x_TD)

    @tf.function(autograph=False)
    def step(*batch):
        return strategy.run(gradients, batch)

    x_TD = np.ones((WORDS, 8), "float32")
    step(*strategy.put_batch((x_TD, np.zeros(WORDS, "int32")), whole=True))
    return step  # Its program is there as long as it is.


@pytest.mark.slow
def test_nothing_of_the_words_goes_by_way_of_the_host(tmp_path, seed_corpus):
    seed_corpus(tmp_path)
    on_host, run = process.run(language_model, True, tmp_path)
    in_int32, want = process.run(language_model, False, tmp_path)
    differs = mesh_text.differences(run, want)
    assert differs["loss"] < 1e-6 and differs["weights"] < 1e-6
    # A byte for each word of a device says which are padding. The 64 draws of
    # the softmax are eight bytes each.
    words = WORDS // 2
    assert [op for op in on_host if op.bytes > max(words, 8 * 64)] == []
    # Tables of plans would, of four bytes an assignment.
    assert max(op.bytes for op in in_int32) > 4 * words


SETTINGS = {
    "dropless": {},
    "drops": {"capacity_factor": 1.0},
    "by gate value": {"capacity_factor": 1.0, "drop_policy": "gate_value"},
    "groups": {"num_groups": 2},
}
CHOOSING = ("batchwise", "hierarchical_batchwise", "expert_choice")
CASES = [
    (router, setting)
    for router in every_router.SETTINGS
    for setting in SETTINGS
    if router not in CHOOSING or "capacity_factor" not in SETTINGS[setting]
]


@pytest.mark.parametrize(
    "router,setting",
    [
        case
        if case == ("noisy_top_k", "drops")
        else sets.thorough(*case)
        if case[0] == "noisy_top_k" or case[0] == "hierarchical_batchwise"
        else sets.slow(*case)
        for case in CASES
    ],
)
def test_the_layer_gives_the_same(router, setting, monkeypatch):
    settings = SETTINGS[setting]
    rows = 12 if setting == "drops" else None
    x_TD = tf.constant(every_router.tokens(12))
    mask_T = tf.constant(np.arange(12) % 5 != 3)

    def outputs_and_gradients():
        layer = every_router.layer(router, jit_compile=False, **settings)
        signature = [
            tf.TensorSpec((rows, every_router.WIDTH), "float64"),
            tf.TensorSpec((rows,), "bool"),
        ]

        @tf.function(input_signature=signature, autograph=False)
        def run(x_TD, mask_T):
            with tf.GradientTape() as tape:
                tape.watch(x_TD)
                y_TD = layer(x_TD, mask=mask_T, training=True)
                total = tf.reduce_sum(y_TD**2) + sum(layer.losses)
            variables = [v.value for v in layer.trainable_variables]
            return [y_TD, *tape.gradient(total, [x_TD, *variables])]

        got = run(x_TD, mask_T)
        numbers = [v.numpy() for v in layer.non_trainable_variables]
        return [*map(tf.convert_to_tensor, got), *numbers]

    want = outputs_and_gradients()
    monkeypatch.setattr(xla, "runs_ops_on_gpu", lambda: True)
    for one, other in zip(outputs_and_gradients(), want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)


PLANS = {
    "rows": lambda expert_TK: plans.plan_rows(expert_TK, 8),
    "blocks": lambda expert_TK: plans.plan_blocks(expert_TK, 8, 5),
    "capacity": lambda expert_TK: plans.plan_capacity(expert_TK, 8, 40),
    "groups": lambda expert_TK: plans.plan_groups(expert_TK[None], 8, 40),
}


@pytest.mark.parametrize("name", PLANS)
def test_no_table_of_a_plan_is_on_the_host(name):
    @tf.function(autograph=False)
    def make(expert_TK):
        tables = vars(PLANS[name](expert_TK)).values()
        return [table for table in tables if tf.is_tensor(table)]

    in_int32, in_int64 = (
        gpu_kernels.on_host_in(
            make.get_concrete_function(tf.TensorSpec((128, 2), dtype)).graph
        )
        for dtype in ("int32", "int64")
    )
    assert in_int32[0].bytes >= 4 * 128
    assert in_int64[0].bytes < 4 * 128, in_int64[:3]


def test_plans_compute_in_int64_on_gpus_alone(monkeypatch):
    expert_TK = tf.constant([[0, 1], [1, 2]])
    assert xla.as_index(expert_TK).dtype == "int32"
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: [kind])
    assert xla.as_index(expert_TK).dtype == "int64"
    dtypes = []

    @tf.function(jit_compile=True)
    def compiled():
        dtypes.append(xla.as_index(expert_TK).dtype)
        return 0

    compiled()
    assert dtypes == ["int32"]
