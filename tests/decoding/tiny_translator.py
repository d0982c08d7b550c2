"""A random recurrent translator with attention, small enough to search whole.

Its weights are drawn, not trained. `Translator.step` is what decoders call;
`Translator.reader` reads one prefix, which is what slow references call.
"""

import functools

import numpy as np
import tensorflow as tf

PAD, START, END = 0, 2, 3
FIRST_WORD = 4


class Translator:
    """`h' = tanh([embedding, h, context] W)`, logits `sharpness * h' U`.

    Args:
        vocabulary_size: int, ids 0 to 3 among them.
        width: int.
        sharpness: float; the larger, the more peaked the probabilities.
        seed: int.
    """

    def __init__(self, vocabulary_size=6, width=5, sharpness=3.0, seed=0):
        rng = np.random.default_rng(seed)

        def draw(*shape):
            return tf.constant(rng.normal(size=shape), tf.float32)

        self.vocabulary_size = vocabulary_size
        self.width = width
        self.embedding_VD = draw(vocabulary_size, width)
        self.kernel_XD = draw(3 * width, width) / width**0.5
        self.softmax_DV = sharpness * draw(width, vocabulary_size) / width**0.5

    def encode(self, source_BS):
        """Memory of a source, 0 where it is padding."""
        source_BS = tf.cast(tf.convert_to_tensor(source_BS), tf.int32)
        return {
            "values": tf.gather(self.embedding_VD, source_BS),
            "mask": source_BS != PAD,
        }

    def initial_states(self, memory):
        return {"h": tf.zeros_like(memory["values"][:, 0])}

    def step(self, tokens_N, states, memory):
        score_NS = tf.einsum("ND,NSD->NS", states["h"], memory["values"])
        score_NS = tf.where(memory["mask"], score_NS, -1e9)
        attention_NS = tf.nn.softmax(2.0 * score_NS)
        context_ND = tf.einsum("NS,NSD->ND", attention_NS, memory["values"])
        embedded_ND = tf.gather(self.embedding_VD, tokens_N)
        x_NX = tf.concat([embedded_ND, states["h"], context_ND], axis=-1)
        h_ND = tf.tanh(tf.matmul(x_NX, self.kernel_XD))
        return tf.matmul(h_ND, self.softmax_DV), {"h": h_ND}, attention_NS

    def reader(self, source_S):
        """A function of a prefix, a tuple without START, of one source.

        It gives the log-probabilities `(V,)` of what follows, and the
        attentions `(len + 1, S)` of the prefix's tokens and of what follows.
        """
        memory = self.encode([source_S])

        @functools.cache
        def read(prefix):
            states, before = self.initial_states(memory), []
            if prefix:
                _, states, before = read(prefix[:-1])
            logits_NV, states, attention_NS = self.step(
                tf.constant([(START, *prefix)[-1]]), states, memory
            )
            log_V = tf.nn.log_softmax(logits_NV)[0].numpy()
            return log_V, states, [*before, attention_NS[0].numpy()]

        def continuations(prefix):
            log_V, _, attention = read(prefix)
            return log_V, np.array(attention)

        return continuations


def sources(num_sentences, longest, vocabulary_size, seed=0):
    """Int `(B, S)`, sentences of 1 to `longest` words, padded with 0."""
    rng = np.random.default_rng(seed)
    source_BS = rng.integers(
        FIRST_WORD, vocabulary_size, (num_sentences, longest)
    )
    length_B = rng.integers(1, longest + 1, num_sentences)
    length_B[0] = longest
    return np.where(np.arange(longest) < length_B[:, None], source_BS, PAD)


def texts(found, sentence):
    """The tokens of a sentence's hypotheses, as tuples."""
    return [
        tuple(tokens[:length].tolist())
        for tokens, length in zip(
            found.tokens_BMI[sentence].numpy(),
            found.lengths_BM[sentence].numpy(),
            strict=True,
        )
        if length
    ]
