"""Callback that translates validation text at every evaluation."""

import keras
import tensorflow as tf

from moe_tf import tags
from moe_tf.data.parallel import preparation
from moe_tf.evaluation import bleu
from moe_tf.training.board import TrainingBoard
from moe_tf.training.task import Task
from moe_tf.training.translation import batch_translate


class ValidationTranslations(keras.callbacks.Callback):
    """Adds BLEU and chrF to the logs and the board, and shows translations.

    Translates the first `translate.validation_sentences` of each pair,
    greedily. The logs get `val_bleu` and `val_chrf`, means over the pairs,
    and with several pairs also `val_bleu_<pair>`. Callbacks that read these
    logs must come later.

    Args:
        task: `TranslationTask`.
        prepared: its `PreparedPairs`.
        board: `TrainingBoard`, whose writers are used.
    """

    def __init__(
        self,
        task: Task,
        prepared: preparation.PreparedPairs,
        board: TrainingBoard,
    ):
        super().__init__()
        self.task = task
        self.board = board
        self._settings = task.config.translate
        self._prepared = prepared
        number = self._settings.validation_sentences
        self._texts = [
            (pair, *task.texts(prepared, "validation", pair, number))
            for pair in (prepared.corpus.pairs if number else ())
        ]

    def on_epoch_end(self, epoch, logs=None):
        if not self._texts:
            return
        translator = self.task.translator(
            self.model, self._prepared, method="greedy", num_best=1
        )
        scores, shown = {}, {}
        for pair, sources, references in self._texts:
            translations = batch_translate.translate_texts(
                translator,
                sources,
                self.task.language(self._prepared, pair),
                self._settings.batch_size,
            )
            scores[pair.name] = bleu.corpus_scores(
                translations, references, self._settings.bleu_tokenize
            )
            rows = zip(sources, translations, references, strict=True)
            shown[pair.name] = [
                batch_translate.format_example(*row)
                for row, _ in zip(
                    rows, range(self._settings.shown), strict=False
                )
            ]
        num_pairs = len(scores)
        logs["val_bleu"] = sum(f.bleu for f in scores.values()) / num_pairs
        logs["val_chrf"] = sum(f.chrf for f in scores.values()) / num_pairs
        if num_pairs > 1:
            for name, of_pair in scores.items():
                logs[f"val_bleu_{name}"] = of_pair.bleu
        self._write(scores, shown)

    def _write(self, scores, shown):
        with (
            self.board.disk_errors(),
            self.board.writer("validation").as_default(self.board.step()),
        ):
            for name, of_pair in scores.items():
                tf.summary.scalar(tags.bleu(name), of_pair.bleu)
                tf.summary.scalar(tags.chrf(name), of_pair.chrf)
                tf.summary.text(tags.signature(name), of_pair.bleu_signature)
                text = [_preformatted(example) for example in shown[name]]
                if text:
                    tf.summary.text(tags.translations(name), text)
            self.board.writer("validation").flush()


def _preformatted(text):
    """Markdown that a dashboard shows as it is."""
    return "\n".join(f"    {line}" for line in text.splitlines())
