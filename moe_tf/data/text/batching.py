"""Batches of sentences of similar length, in a seeded order."""

import bisect
import functools
import itertools
import math
from collections.abc import Iterator

import numpy as np
import tensorflow as tf

from moe_tf import checks
from moe_tf import special_ids
from moe_tf.data.text import corpora
from moe_tf.data.text import preparation

# Number of lines that go from Python to tf.data at once.
_CHUNK = 2048

_LINES_AND_LENGTHS = (
    tf.TensorSpec((None,), tf.string),
    tf.TensorSpec((None,), tf.int32),
)


def bucket_lengths(max_words: int) -> list[int]:
    """Returns the lengths to which sentences are padded.

    The lengths start at 8 and grow by a quarter, rounded up: 8, 10, 13, 17,
    22, ... The last is `max_words + 1`: every sentence has one symbol more,
    `<S>` or `</S>`.
    """
    lengths = []
    length = 8
    while length < max_words + 1:
        lengths.append(length)
        length = math.ceil(length * 1.25)
    return [*lengths, max_words + 1]


def batches_per_pass(
    statistics: preparation.SplitStatistics,
    batch_words: int,
    max_words: int,
    rows_multiple: int | None = None,
) -> int:
    """Returns the number of batches of one pass over a split."""
    lengths = bucket_lengths(max_words)
    in_bucket = [0] * len(lengths)
    for num_words, count in statistics.lengths.items():
        in_bucket[bisect.bisect_left(lengths, num_words + 1)] += count
    return sum(
        math.ceil(count / batch_size)
        for count, batch_size in zip(
            in_bucket,
            _batch_sizes(lengths, batch_words, rows_multiple),
            strict=True,
        )
    )


def batches(
    prepared: preparation.PreparedText,
    split: str,
    batch_words: int,
    seed: int = 0,
    start_step: int = 0,
    *,
    training: bool | None = None,
    shuffle_buffer: int = 65_536,
    rows_multiple: int | None = None,
) -> tf.data.Dataset:
    """Makes the batches of a language model.

    A batch holds sentences of similar length (`bucket_lengths`), at most
    `batch_words` words with padding, or a single longer sentence. Training is
    an endless stream of passes over the split. The order of the sources and
    the shuffling in pass `p` depend on `(seed, p)` alone: `start_step` resumes
    exactly, in this process or another. Evaluation is one pass in the order of
    the text, with every sentence once.

    Args:
        prepared: `PreparedText`.
        split: `"train"`, `"validation"` or `"test"`.
        batch_words: int, maximal number of positions in a batch.
        seed: int, not negative; for training.
        start_step: int, number of batches to skip; for training.
        training: bool. Defaults to whether `split` is `"train"`.
        shuffle_buffer: int, number of sentences held for shuffling; for
            training. `0` keeps the order within a source.
        rows_multiple: optional int that divides the number of sentences of
            each batch, for a mesh or token groups. A batch may then exceed
            `batch_words`, and all batches of one length have the same number
            of rows: where sentences run out, the last rows are all padding,
            with weights of 0.

    Returns:
        A dataset of `(inputs, targets, weights)`. `inputs` is a dictionary
        of int32 `(B, L)`, padded with 0: `tokens` is `<S>` and the words,
        `targets` is the words and `</S>`. The dataset's `targets` equals the
        one in `inputs`. `weights` is float32 `(B, L)`, 1 where `targets` is
        not padding.

    Raises:
        ValueError: an argument cannot be used.
    """
    corpora.check_split(split)
    training = split == "train" if training is None else training
    checks.at_least("batch_words", batch_words, 1)
    checks.at_least("seed", seed, 0)
    checks.at_least("start_step", start_step, 0)
    checks.at_least("shuffle_buffer", shuffle_buffer, 0)
    checks.at_least("rows_multiple", rows_multiple, 1, allow_none=True)
    if start_step and not training:
        raise ValueError(
            f"`start_step` must be 0 without `training`. Received: {start_step}"
        )
    lengths = bucket_lengths(prepared.corpus.max_words)
    sizes = _batch_sizes(lengths, batch_words, rows_multiple)
    one_pass = functools.partial(
        _one_pass, prepared.corpus, split, seed, shuffle_buffer, lengths, sizes
    )
    if training:
        per_pass = batches_per_pass(
            prepared.statistics[split],
            batch_words,
            prepared.corpus.max_words,
            rows_multiple,
        )
        index, done = divmod(start_step, per_pass)
        # Skipped before words are looked up, and within one pass only.
        grouped = tf.data.Dataset.counter(index).flat_map(one_pass).skip(done)
    else:
        grouped = one_pass()
    encode_batch = functools.partial(
        _encode,
        vocabulary=prepared.vocabulary,
        lengths=lengths,
        sizes=sizes if rows_multiple else None,
    )
    dataset = grouped.map(encode_batch, num_parallel_calls=tf.data.AUTOTUNE)
    options = tf.data.Options()
    options.deterministic = True
    return dataset.prefetch(2).with_options(options)


def encode(
    prepared: preparation.PreparedText,
    sentences: list[bytes],
    num_rows: int | None = None,
) -> tuple[dict[str, tf.Tensor], tf.Tensor, tf.Tensor]:
    """Makes one batch of given sentences, in their order.

    Args:
        prepared: `PreparedText`.
        sentences: usable lines; see `lines.reason_to_skip`.
        num_rows: optional int, number of rows, at least the number of
            sentences. Further rows are all padding.

    Returns:
        `(inputs, targets, weights)`, as `batches` has them.
    """
    lengths = bucket_lengths(prepared.corpus.max_words)
    num_words = [len(sentence.split()) for sentence in sentences]
    return _encode(
        tf.constant(sentences),
        tf.constant(num_words),
        prepared.vocabulary,
        lengths,
        num_rows and [num_rows] * len(lengths),
    )


def _one_pass(
    corpus, split, seed, shuffle_buffer, lengths, sizes, index=None
) -> tf.data.Dataset:
    """Groups the lines of pass `index`; of the text in order if `None`."""
    rows = tf.data.Dataset.from_generator(
        functools.partial(_read_pass, corpus, split, seed, shuffle_buffer),
        args=() if index is None else (index,),
        output_signature=_LINES_AND_LENGTHS,
    )
    return _in_buckets(rows.unbatch(), lengths, sizes)


def _read_pass(corpus, split, seed, shuffle_buffer, index=None):
    """Yields the chunks of pass `index`; of the text in order if `None`."""
    if index is None:
        chunks = _chunks(corpus.lines(split), _CHUNK)
    else:
        # Independent of Python's hashes and of TensorFlow's global seed, on
        # which `tf.data.Dataset.shuffle` depends.
        random = np.random.default_rng([seed, int(index)])
        order = random.permutation(len(corpus.sources[split]))
        lines = corpus.lines(split, order=order)
        chunks = _shuffled(lines, shuffle_buffer, random)
    for chunk in chunks:
        yield chunk, np.array([len(line.split()) for line in chunk], np.int32)


def _encode(lines_B, num_words_B, vocabulary, lengths, sizes=None):
    """Makes the tensors of a batch of sentences.

    With `sizes` the number of rows is the one of the padded length.
    """
    ids = vocabulary.encode(tf.strings.split(lines_B))
    one_B1 = tf.ones_like(num_words_B)[:, tf.newaxis]
    bucket = tf.searchsorted(lengths, [tf.reduce_max(num_words_B) + 1])
    length = tf.gather(lengths, bucket[0])
    num_rows = -1 if sizes is None else tf.gather(sizes, bucket[0])
    shape = tf.stack([num_rows, length])
    tokens = tf.concat([one_B1 * special_ids.START, ids], axis=1)
    targets = tf.concat([ids, one_B1 * special_ids.END], axis=1)
    tokens_BL = tokens.to_tensor(special_ids.PAD, shape=shape)
    targets_BL = targets.to_tensor(special_ids.PAD, shape=shape)
    weights_BL = tf.cast(targets_BL != special_ids.PAD, tf.float32)
    inputs = {"tokens": tokens_BL, "targets": targets_BL}
    return inputs, targets_BL, weights_BL


def _in_buckets(rows, lengths, sizes):
    """Groups `(line, number of words)` into batches by padded length.

    Lines are split into words and padded later: splitting and looking up a
    batch at a time is twice as fast as a line at a time.
    """
    return rows.bucket_by_sequence_length(
        element_length_func=lambda line, num_words: num_words + 1,
        bucket_boundaries=[length + 1 for length in lengths[:-1]],
        bucket_batch_sizes=sizes,
        no_padding=True,
    )


def _batch_sizes(lengths, batch_words, rows_multiple=None):
    step = rows_multiple or 1
    return [
        max(step, batch_words // length // step * step) for length in lengths
    ]


def _chunks(lines: Iterator[bytes], size: int) -> Iterator[np.ndarray]:
    while chunk := list(itertools.islice(lines, size)):
        yield np.array(chunk, object)


def _shuffled(lines, buffer_size, random) -> Iterator[np.ndarray]:
    """Yields chunks of `lines` in an order drawn by the generator `random`.

    The buffer holds `buffer_size` lines. Each chunk that is read is shuffled
    with the buffer, and as many of these lines are yielded.
    """
    if not buffer_size:
        yield from _chunks(lines, _CHUNK)
        return
    held = np.array([], object)
    # Large chunks: a line is moved at each shuffle that it waits for.
    for chunk in _chunks(lines, max(_CHUNK, buffer_size // 8)):
        mixed = random.permutation(np.concatenate([held, chunk]))
        held = mixed[:buffer_size]
        if len(mixed) > buffer_size:
            yield mixed[buffer_size:]
    yield held
