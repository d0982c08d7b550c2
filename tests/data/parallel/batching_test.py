import itertools

import hypothesis
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies as st

from moe_tf.data.parallel import batch_plan
from moe_tf.data.parallel import batching
from moe_tf.data.parallel import corpora
from moe_tf.data.parallel import preparation
from tests import sets
from tests.data.parallel import files

SIZES = {"en-de": (150, 9, 20), "fr-en": (40, 5, 6), "en-fr": (3, 2, 2)}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Three language pairs, two target languages among English."""
    folder = tmp_path_factory.mktemp("three")
    config = files.write(folder, SIZES)
    return preparation.prepare_pairs(config, str(folder / "run"))


@pytest.fixture(scope="module")
def one_pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    config = files.write(folder, {"en-de": (90, 9, 20)})
    return preparation.prepare_pairs(config, str(folder / "run"))


def weighted(prepared, **weights):
    """The same with weights, by name of a pair with `_` for `-`."""
    corpus = prepared.corpus
    found = [
        corpora.Pair(p.source, p.target, weights[f"{p.source}_{p.target}"])
        for p in corpus.pairs
    ]
    corpus = corpora.ParallelCorpus(found, corpus.bitexts)
    return preparation.PreparedPairs(
        corpus, prepared.wordpieces, prepared.statistics, prepared.stores
    )


def numpy_of(dataset, count=None):
    return list(itertools.islice(dataset.as_numpy_iterator(), count))


def same(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        tf.nest.map_structure(np.testing.assert_array_equal, one, other)


def rows_of(prepared, batches):
    """What batches hold, as `parallel_files.texts`; checks each number."""
    pieces = prepared.wordpieces
    symbols = {pieces.language_id(name): name for name in pieces.languages}
    found = []
    for inputs, targets, weights in batches:
        np.testing.assert_array_equal(inputs["targets"], targets)
        np.testing.assert_array_equal(weights, targets != 0)
        texts = [
            pieces.decode(ids).numpy() for ids in (inputs["source"], targets)
        ]
        for source, tokens, target, *both in zip(
            inputs["source"], inputs["tokens"], targets, *texts, strict=True
        ):
            if not target.any():
                assert not source.any() and not tokens.any()
                continue
            length = int((target != 0).sum())
            assert target[length - 1] == 3
            assert tokens.tolist() == [2, *target[: length - 1]] + [0] * (
                len(tokens) - length
            )
            size = int((source != 0).sum())
            assert source[size - 1] == 3 and (source == 3).sum() == 1
            language = symbols[source[0]] if symbols else "de"
            found.append((*both, language))
    return found


def test_lengths_climb_by_a_third_and_a_half():
    lengths = sorted({batch_plan.padded_length(n) for n in range(1, 1000)})
    assert lengths == (
        [8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
    )
    for n in range(1, 1000):
        padded = batch_plan.padded_length(n)
        assert padded >= n
        assert padded == 8 or lengths[lengths.index(padded) - 1] < n
    assert all(384 % length == 0 for length in lengths[:9])


def test_rows_fill_a_batch_and_keep_to_the_multiple():
    assert batch_plan.rows_per_batch(24, 384) == 16
    assert batch_plan.rows_per_batch(24, 400, 8) == 16
    assert batch_plan.rows_per_batch(24, 384, 10) == 10
    assert batch_plan.rows_per_batch(512, 384) == 1
    assert batch_plan.rows_per_batch(512, 384, 8) == 8


@pytest.mark.parametrize("fixture", ["one_pair", "prepared"])
@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("rows_multiple", [sets.thorough(None), 4])
def test_evaluation_has_every_pair_once(request, fixture, split, rows_multiple):
    prepared = request.getfixturevalue(fixture)
    dataset = batching.batches(
        prepared, split, 96, training=False, rows_multiple=rows_multiple
    )
    found = numpy_of(dataset)
    count = batching.num_batches(
        prepared, split, 96, rows_multiple=rows_multiple
    )
    assert len(found) == count
    want = files.texts(prepared, split)
    assert sorted(rows_of(prepared, found)) == sorted(want)
    lengths = [targets.shape[1] for _, targets, _ in found]
    assert lengths == sorted(lengths)
    shapes = {targets.shape for _, targets, _ in found}
    assert shapes == {
        (batch_plan.rows_per_batch(length, 96, rows_multiple), length)
        for length in lengths
    }
    same(found, numpy_of(dataset))  # and in the same order again


def test_evaluation_keeps_the_order_of_the_text_inside_a_length(one_pair):
    found = numpy_of(batching.batches(one_pair, "test", 10**5))
    want = files.texts(one_pair, "test")
    for batch in found:
        places = [want.index(row) for row in rows_of(one_pair, [batch])]
        assert places == sorted(places)


def test_one_language_pair_can_be_read_alone(prepared):
    for name, counts in SIZES.items():
        found = numpy_of(
            batching.batches(prepared, "validation", 96, pair=name)
        )
        rows = rows_of(prepared, found)
        want = files.texts(prepared, "validation", [name])
        assert len(rows) == counts[1]
        assert sorted(rows) == sorted(want)
        assert len(found) == batching.num_batches(
            prepared, "validation", 96, pair=name
        )


def test_a_batch_is_no_longer_than_it_must_be(prepared):
    for inputs, targets, _ in numpy_of(
        batching.batches(prepared, "train", 96, training=False)
    ):
        longer = np.maximum(
            (inputs["source"] != 0).sum(1), (targets != 0).sum(1)
        )
        for length in longer[longer > 0]:
            assert batch_plan.padded_length(int(length)) == targets.shape[1]


def test_batches_of_a_multiple_of_384_have_equal_positions(prepared):
    found = numpy_of(batching.batches(prepared, "train", 384), 30)
    assert {targets.size for _, targets, _ in found} == {384}
    spec = batching.batches(prepared, "train", 384).element_spec
    ids = tf.TensorSpec((None, None), tf.int32)
    assert spec == (
        {"source": ids, "tokens": ids, "targets": ids},
        ids,
        tf.TensorSpec((None, None), tf.float32),
    )


def test_a_long_pair_is_a_batch_of_its_own(tmp_path):
    config = files.write(tmp_path, {"en-de": (50, 3, 3)})
    long = " ".join(["the cat"] * 150)
    for language in ("en", "de"):
        path = tmp_path / f"test.en-de.{language}"
        path.write_text(path.read_text() + f"{long}\n")
    prepared = preparation.prepare_pairs(config, str(tmp_path / "run"))
    *_, (inputs, targets, _) = numpy_of(batching.batches(prepared, "test", 96))
    assert targets.shape[0] == 1
    assert targets.shape[1] == batch_plan.padded_length(
        prepared.statistics["test"]["en-de"].longest
    )
    assert rows_of(prepared, [(inputs, targets, targets != 0)]) == [
        (long.encode(), long.encode(), "de")
    ]


@pytest.mark.parametrize("rows_multiple", [sets.thorough(None), 4])
def test_each_pass_has_every_pair_once_in_another_order(
    prepared, rows_multiple
):
    count = batching.batches_in_first_pass(
        prepared, 96, rows_multiple=rows_multiple
    )
    found = numpy_of(
        batching.batches(prepared, "train", 96, 3, rows_multiple=rows_multiple),
        2 * count,
    )
    first, second = (
        rows_of(prepared, part) for part in (found[:count], found[count:])
    )
    want = files.texts(prepared)
    assert sorted(first) == sorted(second) == sorted(want)
    assert first != second
    lengths = [targets.shape[1] for _, targets, _ in found[:count]]
    assert lengths != sorted(lengths)
    languages = [language for _, _, language in first]
    assert languages != sorted(languages)


def test_order_depends_on_the_seed_and_nothing_else(prepared):
    def first_batches(seed):
        return numpy_of(batching.batches(prepared, "train", 96, seed), 9)

    tf.random.set_seed(1)
    one = first_batches(5)
    tf.random.set_seed(2)
    np.random.seed(2)
    same(first_batches(5), one)
    assert rows_of(prepared, first_batches(6)) != rows_of(prepared, one)


def test_the_stream_is_what_it_was():
    """A change of the order would make resumed runs repeat text."""
    plan = batch_plan.BatchPlan(held([(3, 3)] * 9), "train", 24, None, None)
    found = itertools.islice(plan.training_batches(7, 0), 6)
    assert [batch.indices.tolist() for batch in found] == [
        [2, 1, 6],
        [5, 8, 0],
        [7, 3, 4],
        [5, 1, 0],
        [8, 2, 3],
        [4, 6, 7],
    ]


@pytest.mark.parametrize(
    "weights", [sets.thorough(None), {"en_de": 1, "fr_en": 2, "en_fr": 0.01}]
)
def test_a_later_start_is_the_tail_of_the_stream(prepared, weights):
    if weights:
        prepared = weighted(prepared, **weights)
    count = batching.batches_in_first_pass(prepared, 96, 7)
    dataset = batching.batches(prepared, "train", 96, 7)
    whole = numpy_of(dataset, 3 * count)
    for start in (1, count - 1, count, 2 * count + 5):
        tail = batching.batches(prepared, "train", 96, 7, start_step=start)
        same(numpy_of(tail, len(whole) - start), whole[start:])


def test_weights_are_shares_and_leave_nothing_out(prepared):
    prepared = weighted(prepared, en_de=1, fr_en=2, en_fr=0.02)
    plan = batch_plan.BatchPlan(prepared, "train", 96, None, None)
    passes = [plan.pairs_of_pass(3, index) for index in range(8)]
    total = sum(counts[0] for counts in SIZES.values())
    drawn = np.concatenate(passes)
    assert abs(len(drawn) - 8 * total) <= 2
    counts = np.bincount(drawn, minlength=total)
    shares = [counts[:150].sum(), counts[150:190].sum(), counts[190:].sum()]
    want = np.array([1, 2, 0.02]) / 3.02 * 8 * total
    np.testing.assert_allclose(shares, want, atol=1)
    for part in (counts[:150], counts[150:190], counts[190:]):
        assert part.max() - part.min() <= 1  # none twice before all once
    assert shares[2] > 3
    orders = [numbers[numbers < 150][:9].tolist() for numbers in passes]
    assert orders[0] != orders[3]


def test_default_weights_are_the_numbers_of_sentences(prepared):
    counts = {"en_de": 150, "fr_en": 40, "en_fr": 3}
    plans = [
        batch_plan.BatchPlan(found, "train", 96, None, None)
        for found in (prepared, weighted(prepared, **counts))
    ]
    for index in range(3):
        np.testing.assert_array_equal(
            *(plan.pairs_of_pass(1, index) for plan in plans)
        )


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(
    lengths=st.lists(
        st.tuples(st.integers(0, 40), st.integers(0, 40)),
        min_size=1,
        max_size=50,
    ),
    batch_tokens=st.integers(1, 200),
    rows_multiple=st.sampled_from([None, 1, 3]),
    seed=st.integers(0, 2**63),
)
def test_any_lengths_make_full_passes(
    tmp_path_factory, lengths, batch_tokens, rows_multiple, seed
):
    plan = batch_plan.BatchPlan(
        held(lengths), "train", batch_tokens, None, rows_multiple
    )
    stream = plan.training_batches(seed, 0)
    count = plan.num_batches(plan.all_indices)
    for part in (
        list(plan.evaluation_batches()),
        list(itertools.islice(stream, count)),
        list(itertools.islice(stream, count)),
    ):
        assert len(part) == count
        numbers = np.concatenate([batch.indices for batch in part])
        assert sorted(numbers) == list(range(len(lengths)))
        for batch in part:
            assert 0 < len(batch.indices) <= batch.num_rows
            assert batch.num_rows % (rows_multiple or 1) == 0
            for number in batch.indices:
                longer = max(lengths[number]) + 1
                assert batch.length == batch_plan.padded_length(longer)


def held(lengths):
    """Prepared pairs of these lengths, of which only a plan can be made."""

    class Store:
        def __init__(self):
            self.lengths = np.array(lengths, np.int32)

        def __len__(self):
            return len(lengths)

    corpus = corpora.ParallelCorpus([corpora.Pair("en", "de")], {})
    return preparation.PreparedPairs(
        corpus, None, {}, {"train": {"en-de": Store()}}
    )


def test_given_sentences_give_the_batches_that_files_give(prepared):
    sources, targets, languages = zip(
        *files.texts(prepared, "test", ["en-de"]), strict=True
    )
    batch = batching.encode_pairs(prepared, sources, targets, "de")
    assert rows_of(prepared, [batch]) == list(
        zip(sources, targets, languages, strict=True)
    )
    padded = batching.encode_pairs(
        prepared, sources, targets, "de", num_rows=24
    )
    for one, other in zip(
        tf.nest.flatten(batch), tf.nest.flatten(padded), strict=True
    ):
        np.testing.assert_array_equal(other[:20], one)
        assert other.shape == (24, one.shape[1])
        assert not other[20:].any()
    source_BS = padded[0]["source"]
    assert source_BS.dtype == np.int32
    longest = max((ids != 0).sum(1).max() for ids in padded[0].values())
    assert source_BS.shape[1] == batch_plan.padded_length(longest)


def test_given_sentences_may_be_odd(one_pair):
    texts = ["", "<2de> </S>", b"\xff the", "a\tb\u2028c", "x" * 5000]
    inputs, *_ = batching.encode_pairs(one_pair, texts, texts)
    ids = inputs["source"]
    assert ids.shape[0] == 5
    assert ids[0].tolist()[:2] == [3, 0]
    assert ((ids == 3).sum(axis=1) == 1).all()
    assert not (ids == 2).any()


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"split": "dev"}, "`split`.*'dev'"),
        ({"batch_tokens": 0}, "`batch_tokens`.* batch_tokens=0"),
        ({"seed": -1}, "`seed`.* seed=-1"),
        ({"start_step": -1}, "`start_step`.* start_step=-1"),
        ({"rows_multiple": 0}, "`rows_multiple`.* rows_multiple=0"),
        ({"start_step": 2, "training": False}, "`start_step`.*Received: 2"),
        ({"pair": "de-en"}, "`pair` must be one of.*'de-en'"),
    ],
)
def test_wrong_arguments_are_named(prepared, arguments, message):
    with pytest.raises(ValueError, match=message):
        batching.batches(
            prepared, **{"split": "train", "batch_tokens": 9, **arguments}
        )


def test_wrong_sentences_are_named(prepared):
    with pytest.raises(ValueError, match="`language`.*None"):
        batching.encode_pairs(prepared, ["a"], ["b"])
    with pytest.raises(ValueError, match="equally many.* 1 and 2"):
        batching.encode_pairs(prepared, ["a"], ["b", "c"], "de")
    with pytest.raises(ValueError, match="at least one sentence"):
        batching.encode_pairs(prepared, [], [], "de")
    with pytest.raises(ValueError, match="`num_rows`.*num_rows=1"):
        batching.encode_pairs(
            prepared, ["a", "b"], ["a", "b"], "de", num_rows=1
        )
