import hashlib
import itertools
import os
import pathlib
import subprocess
import sys

import hypothesis
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies as st

from moe_tf.data.text import batching
from moe_tf.data.text import preparation
from moe_tf.data.vocabulary import Vocabulary
from tests import sets

# Printable, and every control character but the one that ends a line.
ODD = "".join(map(chr, range(1, 10))) + "".join(map(chr, range(11, 48)))


def prepare_lines(corpus, split="train"):
    counts, found = preparation._count(corpus, split)
    return preparation.PreparedText(
        corpus, Vocabulary.from_counts(counts, 999), {split: found}
    )


def numbered(first, count, max_words, seed=0):
    """Sentences that all differ, of 1 to `max_words` words."""
    random = np.random.default_rng(seed)
    for index in range(first, first + count):
        rest = random.integers(0, max_words)
        yield f"s{index} {'w ' * rest}\n".encode()


@pytest.fixture(scope="module")
def prepared(held_corpus):
    sources = [list(numbered(90 * i, 90, 20, seed=i)) for i in range(3)]
    return prepare_lines(held_corpus(*sources, max_words=20))


def numpy_of(dataset, count=None):
    return list(itertools.islice(dataset.as_numpy_iterator(), count))


def same(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        tf.nest.map_structure(np.testing.assert_array_equal, one, other)


def sentences(prepared, dataset):
    return [
        prepared.vocabulary.sentence(row)
        for inputs, _, _ in dataset
        for row in inputs["targets"]
    ]


def texts(prepared, split="train"):
    return [
        b" ".join(line.split()).decode()
        for line in prepared.corpus.lines(split)
    ]


@pytest.mark.parametrize("max_words", [1, 6, 7, 8, 20, 100, 1000])
def test_bucket_lengths_climb_to_the_limit(max_words):
    lengths = batching.bucket_lengths(max_words)
    assert lengths == sorted(set(lengths))
    assert lengths[-1] == max_words + 1
    for short, long in itertools.pairwise(lengths):
        assert short >= 8
        assert long <= np.ceil(short * 1.25)


def test_a_batch_holds_shifted_padded_sentences(held_corpus):
    prepared = prepare_lines(held_corpus([b"a b\n", b"a a a\n"], max_words=6))
    dataset = batching.batches(prepared, "train", 100, training=False)
    ((inputs, targets, weights),) = numpy_of(dataset)
    np.testing.assert_array_equal(
        inputs["tokens"], [[2, 4, 5, 0, 0, 0, 0], [2, 4, 4, 4, 0, 0, 0]]
    )
    np.testing.assert_array_equal(
        targets, [[4, 5, 3, 0, 0, 0, 0], [4, 4, 4, 3, 0, 0, 0]]
    )
    np.testing.assert_array_equal(inputs["targets"], targets)
    np.testing.assert_array_equal(weights, targets != 0)
    ids = tf.TensorSpec((None, None), tf.int32)
    assert dataset.element_spec == (
        {"tokens": ids, "targets": ids},
        ids,
        tf.TensorSpec((None, None), tf.float32),
    )


def test_batches_fill_their_bucket_and_keep_to_the_limit(prepared):
    lengths = batching.bucket_lengths(20)
    full = 0
    for inputs, targets, weights in numpy_of(
        batching.batches(prepared, "train", 64, training=False)
    ):
        rows, length = targets.shape
        assert inputs["tokens"].shape == weights.shape == targets.shape
        assert length in lengths
        assert rows * length <= 64
        full += rows == 64 // length
        # No sentence would fit a shorter bucket.
        shorter = max([x for x in lengths if x < length], default=0)
        assert (weights.sum(axis=1) > shorter).all()
    assert full > 20


def test_one_sentence_longer_than_a_batch_is_a_batch(held_corpus):
    prepared = prepare_lines(held_corpus([b"a " * 20, b"b " * 18]))
    found = numpy_of(batching.batches(prepared, "train", 5, training=False))
    assert [len(targets) for _, targets, _ in found] == [1, 1]


def test_evaluation_has_every_word_once_in_order(prepared):
    dataset = numpy_of(batching.batches(prepared, "train", 64, training=False))
    assert sorted(sentences(prepared, dataset)) == sorted(texts(prepared))
    words = sum(weights.sum() for _, _, weights in dataset)
    assert words == prepared.statistics["train"].words
    same(
        dataset,
        numpy_of(
            batching.batches(prepared, "train", 64, seed=9, training=False)
        ),
    )
    in_order = batching.batches(prepared, "train", 10**6, training=False)
    rows = sentences(prepared, numpy_of(in_order))
    numbers = [int(row.split()[0][1:]) for row in rows if len(row) < 8]
    assert numbers == sorted(numbers)
    assert len(numbers) > 9


@pytest.mark.parametrize("training", [False, True])
def test_rows_are_a_multiple_and_the_rest_is_empty(prepared, training):
    lengths = batching.bucket_lengths(20)
    found = prepared.statistics["train"]
    count = batching.batches_per_pass(found, 64, 20, rows_multiple=4)
    dataset = batching.batches(
        prepared, "train", 64, training=training, rows_multiple=4
    )
    batches = numpy_of(dataset, count)
    full = {8: 8, 10: 4, 13: 4, 17: 4, 21: 4}  # 21 * 4 are over 64
    assert list(full) == lengths
    empty = 0
    for inputs, targets, weights in batches:
        rows, length = targets.shape
        assert rows == full[length]
        np.testing.assert_array_equal(weights, targets != 0)
        is_empty = weights.sum(axis=1) == 0
        assert not inputs["tokens"][is_empty].any()
        assert not is_empty[0]
        empty += is_empty.sum()
    assert empty > 0
    read = sentences(prepared, batches)
    assert sorted(filter(None, read)) == sorted(texts(prepared))
    if not training:
        assert len(numpy_of(dataset)) == count


def test_given_sentences_get_empty_rows(prepared):
    lines = [b"w w w", b"w"]
    inputs, targets, weights = batching.encode(prepared, lines, num_rows=4)
    np.testing.assert_array_equal(tf.reduce_sum(weights, 1), [4, 2, 0, 0])
    for bare, padded in zip(
        tf.nest.flatten(batching.encode(prepared, lines)),
        tf.nest.flatten((inputs, targets, weights)),
        strict=True,
    ):
        np.testing.assert_array_equal(padded[:2], bare)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_other_splits_are_for_evaluation_unless_said(held_corpus, split):
    corpus = held_corpus([b"a b\n", b"c\n"], split=split)
    prepared = prepare_lines(corpus, split)
    assert len(numpy_of(batching.batches(prepared, split, 99))) == 1
    training = batching.batches(prepared, split, 99, training=True)
    assert len(numpy_of(training, 5)) == 5


@pytest.mark.parametrize("buffer", [0, 1, 50, 10_000])
def test_each_pass_has_every_sentence_once(prepared, buffer):
    count = batching.batches_per_pass(prepared.statistics["train"], 64, 20)
    found = numpy_of(
        batching.batches(prepared, "train", 64, 3, shuffle_buffer=buffer),
        2 * count,
    )
    first, second = (
        sentences(prepared, part) for part in (found[:count], found[count:])
    )
    assert sorted(first) == sorted(second) == sorted(texts(prepared))
    assert first != second


def test_order_depends_on_the_seed_and_nothing_else(prepared):
    def first_pass(seed):
        return sentences(
            prepared,
            numpy_of(batching.batches(prepared, "train", 64, seed), 20),
        )

    tf.random.set_seed(1)
    one = first_pass(5)
    tf.random.set_seed(2)
    np.random.seed(2)
    assert first_pass(5) == one
    assert first_pass(6) != one


def test_sentences_of_all_sources_mix(prepared):
    dataset = batching.batches(prepared, "train", 64, 3)
    rows = sentences(prepared, numpy_of(dataset, 12))
    sources = [int(row.split()[0][1:]) // 90 for row in rows]
    assert min(map(sources.count, range(3))) > 3


def test_a_small_buffer_keeps_sentences_near_their_place():
    lines = [b"%d" % i for i in range(20_000)]
    mixed = np.concatenate(
        list(batching._shuffled(iter(lines), 100, np.random.default_rng(0)))
    ).astype(int)
    assert sorted(mixed) == list(range(20_000))
    early = mixed - np.arange(20_000)
    assert early.max() <= batching._CHUNK + 100
    assert (np.diff(mixed) == 1).mean() < 0.01


def test_a_later_start_is_the_tail_of_the_stream(prepared):
    count = batching.batches_per_pass(prepared.statistics["train"], 64, 20)
    whole = numpy_of(batching.batches(prepared, "train", 64, 7), 3 * count)
    for start in (1, count - 1, count, count + 1, 2 * count + 5):
        tail = batching.batches(prepared, "train", 64, 7, start_step=start)
        same(numpy_of(tail, 3 * count - start), whole[start:])


def digest(prepared):
    dataset = batching.batches(
        prepared, "train", 4096, 11, start_step=700, shuffle_buffer=20_000
    )
    sha = hashlib.sha256()
    for element in dataset.take(12).as_numpy_iterator():
        for array in tf.nest.flatten(element):
            sha.update(repr(array.shape).encode() + array.tobytes())
    return sha.hexdigest()


NEW_PROCESS = """
import sys
import ml_collections
import moe_tf
from moe_tf.data.text import preparation
from tests.data.text import batching_test
config = ml_collections.ConfigDict(
    {"corpus": "sotu", "max_words": 100, "vocabulary_size": 20_000}
)
prepared = preparation.prepare_text(config, sys.argv[1])
print(batching_test.digest(prepared))
for name in ("tensorflow_datasets", "tensorflow_text", "sotu"):
    assert name not in sys.modules, name
"""


@pytest.mark.thorough
def test_a_new_process_goes_on_with_the_same_batches(
    sotu_prepared, sotu_workdir
):
    root = pathlib.Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", NEW_PROCESS, sotu_workdir],
        cwd=root,
        env={**os.environ, "PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == digest(sotu_prepared)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "split", ["train", *map(sets.slow, ("validation", "test"))]
)
def test_the_formula_counts_real_batches(sotu_prepared, split):
    found = sotu_prepared.statistics[split]
    count = batching.batches_per_pass(found, 4096, 100)
    sizes = [
        (len(targets), weights.sum())
        for _, targets, weights in batching.batches(
            sotu_prepared, split, 4096, training=False
        ).as_numpy_iterator()
    ]
    rows, words = np.sum(sizes, axis=0)
    assert (len(sizes), rows, words) == (count, found.lines, found.words)


@pytest.mark.thorough
@hypothesis.settings(
    deadline=None,
    max_examples=6,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=60),
    max_words=st.integers(1, 12),
    batch_words=st.integers(1, 50),
    seed=st.integers(0, 2**63),
)
def test_the_formula_counts_any_batches(
    held_corpus, lengths, max_words, batch_words, seed
):
    hypothesis.assume(min(lengths) <= max_words)
    rows = [b"x " * length for length in lengths]
    prepared = prepare_lines(held_corpus(rows, max_words=max_words))
    found = prepared.statistics["train"]
    count = batching.batches_per_pass(found, batch_words, max_words)
    one_pass = batching.batches(prepared, "train", batch_words, training=False)
    assert len(numpy_of(one_pass)) == count
    training = numpy_of(
        batching.batches(prepared, "train", batch_words, seed), 2 * count
    )
    for part in (training[:count], training[count:]):
        words = sum(weights.sum() for _, _, weights in part)
        assert words == found.words


def test_odd_characters_count_alike_in_python_and_tensorflow(held_corpus):
    rows = [f"a{character}b\n".encode() for character in ODD]
    rows += ["a\u00a0b\n".encode(), "a\u2003b\u0085c\n".encode(), b"a\0b\n"]
    prepared = prepare_lines(held_corpus(rows))
    dataset = batching.batches(prepared, "train", 10**4, training=False)
    for _, targets, weights in numpy_of(dataset):
        np.testing.assert_array_equal(weights, targets != 0)
        np.testing.assert_array_equal((targets == 3).sum(axis=1), 1)
        assert (targets != 1).all()


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"split": "dev"}, "`split`.*'dev'"),
        ({"batch_words": 0}, "`batch_words`.* batch_words=0"),
        ({"seed": -1}, "`seed`.* seed=-1"),
        ({"start_step": -1}, "`start_step`.* start_step=-1"),
        ({"shuffle_buffer": -1}, "`shuffle_buffer`.* shuffle_buffer=-1"),
        ({"rows_multiple": 0}, "`rows_multiple`.* rows_multiple=0"),
        ({"start_step": 2, "training": False}, "`start_step`.*Received: 2"),
    ],
)
def test_wrong_arguments_are_named(prepared, arguments, message):
    with pytest.raises(ValueError, match=message):
        batching.batches(
            prepared, **{"split": "train", "batch_words": 9, **arguments}
        )
