"""What beam search and sampling share: rows of sentences and their states.

A decoder keeps `M` rows for each of `B` sentences, `N = B * M` in all; row
`b * M + m` is the `m`-th of sentence `b`.
"""

import tensorflow as tf


def repeated(tree, times, num_sentences):
    """Each leaf `(B, ...)` as `(B * times, ...)`, a row's copies together.

    Raises:
        ValueError: a leaf has no axes.
        tf.errors.InvalidArgumentError: a leaf's first axis is not
            `num_sentences`.
    """

    def repeat(leaf):
        leaf = tf.convert_to_tensor(leaf)
        if not leaf.shape.rank:
            raise ValueError(
                "Memory and states must be tensors whose first axis is that "
                f"of the sentences. Received: shape {leaf.shape}"
            )
        tf.debugging.assert_equal(
            tf.shape(leaf)[0],
            num_sentences,
            "Memory and states must have one row for each of `max_length_B`.",
        )
        ones = [1] * (leaf.shape.rank - 1)
        return joined(tf.tile(leaf[:, None], [1, times, *ones]))

    return tf.nest.map_structure(repeat, tree)


def reordered(tree, row_N):
    """Each leaf's rows in the order `row_N`."""
    return tf.nest.map_structure(lambda leaf: tf.gather(leaf, row_N), tree)


def joined(x_BM):
    """`(B, M, ...)` as `(B * M, ...)`."""
    return tf.reshape(x_BM, [-1, *_sizes(x_BM)[2:]])


def by_sentence(x_N, num_rows):
    """`(B * num_rows, ...)` as `(B, num_rows, ...)`."""
    return tf.reshape(x_N, [-1, num_rows, *_sizes(x_N)[1:]])


def any_number_of_rows(tree):
    """Shapes for `tf.while_loop`: those of the leaves, but for their rows."""
    return tf.nest.map_structure(
        lambda leaf: tf.TensorShape([None, *leaf.shape[1:]]), tree
    )


def most_positions(max_length_B):
    """`max_length_B` as int32 `(B,)`, and the largest of them, at least 1.

    Raises:
        ValueError: it is not one number a sentence.
        tf.errors.InvalidArgumentError: one of them is negative.
    """
    max_length_B = tf.convert_to_tensor(max_length_B)
    if max_length_B.shape.rank != 1 or not max_length_B.dtype.is_integer:
        raise ValueError(
            "`max_length_B` must be whole numbers, one a sentence. Received: "
            f"{max_length_B.dtype.name} of shape {max_length_B.shape}"
        )
    max_length_B = tf.cast(max_length_B, tf.int32)
    tf.debugging.Assert(
        tf.reduce_all(max_length_B >= 0),
        ["`max_length_B` must not be negative. Received:", max_length_B],
    )
    # The start matters where there is no sentence.
    return max_length_B, tf.reduce_max(tf.concat([[1], max_length_B], axis=0))


class Step:
    """A model's step function, with what it returns checked.

    Args:
        step: function of `(tokens_N, states, memory)`.
        memory: nested tensors of `N` rows.
        states: nested tensors of `N` rows, for the shapes that must stay.
        needs_attention: bool.
    """

    def __init__(self, step, memory, states, needs_attention):
        self._step = step
        self._memory = memory
        self._shapes = any_number_of_rows(states)
        self._needs_attention = needs_attention

    def __call__(self, tokens_N, states, live_N, position):
        """One step.

        Returns:
            `(logits_NV, total_N, states, attention_NS)`: float32 logits,
            their logsumexp, states; attention is `None` if not needed.

        Raises:
            ValueError: the step gives no attention and it is needed, or
                logits or states of other shapes.
            tf.errors.InvalidArgumentError: the logits of a live row hold NaN
                or infinity, or are all `-inf`.
        """
        logits_NV, states, attention_NS = self._step(
            tokens_N, states, self._memory
        )
        logits_NV = tf.cast(logits_NV, tf.float32)
        if logits_NV.shape.rank != 2 or (logits_NV.shape[1] or 0) < 2:
            raise ValueError(
                "The step's logits must be (N, V) with a known V of 2 or "
                f"more. Received: shape {logits_NV.shape}"
            )
        total_N = tf.reduce_logsumexp(logits_NV, axis=-1)
        # Rows that are not live may hold anything, and those of padding do.
        fine_N = tf.math.is_finite(total_N) | ~live_N
        tf.debugging.Assert(
            tf.reduce_all(fine_N),
            [
                "The step's logits hold NaN or infinity, or are all -inf. "
                "Position and rows:",
                position,
                tf.where(~fine_N)[:, 0],
            ],
        )
        states = tf.nest.map_structure(
            lambda shape, leaf: tf.ensure_shape(leaf, shape),
            self._shapes,
            states,
        )
        if not self._needs_attention:
            return logits_NV, total_N, states, None
        if attention_NS is None:
            raise ValueError(
                "`coverage_penalty` and `return_attention` need a step that "
                "returns attention. Received: None from the step; pass "
                "coverage_penalty=0.0, return_attention=False"
            )
        return logits_NV, total_N, states, tf.cast(attention_NS, tf.float32)


def _sizes(x):
    """Sizes of the axes: ints where known."""
    dynamic = tf.shape(x)
    return [
        dynamic[axis] if size is None else size
        for axis, size in enumerate(x.shape)
    ]
