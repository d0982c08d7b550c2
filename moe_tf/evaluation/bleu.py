"""BLEU and chrF of translations, by sacrebleu."""

import json
import typing
from collections.abc import Sequence

from moe_tf import checks


class CorpusScores(typing.NamedTuple):
    """Scores of a corpus, 0 to 100, with their signatures.

    Example:

    >>> scores = moe_tf.evaluation.CorpusScores(40.1, 60.2, "case:lc", "nc:6")
    >>> scores.bleu, scores.bleu_interval
    (40.1, None)

    Attributes:
        bleu: float.
        chrf: float, chrF2.
        bleu_signature: sacrebleu's signature, the settings that the score
            depends on; to be reported beside the score.
        chrf_signature: likewise for chrF.
        bleu_interval: 95 % confidence interval `(low, high)` by bootstrap;
            `None` unless asked for.
        chrf_interval: likewise for chrF.
    """

    bleu: float
    chrf: float
    bleu_signature: str
    chrf_signature: str
    bleu_interval: tuple[float, float] | None = None
    chrf_interval: tuple[float, float] | None = None


def corpus_scores(
    translations: Sequence[str],
    references: Sequence[str],
    tokenize: str = "13a",
    num_resamples: int = 0,
) -> CorpusScores:
    """Scores a corpus against one reference a sentence.

    Example:

    >>> scores = moe_tf.evaluation.corpus_scores(
    ...     ["the cat sat on the mat"], ["the cat sat on a mat"]
    ... )
    >>> round(scores.bleu, 1), round(scores.chrf, 1)
    (53.7, 72.1)

    Args:
        translations: detokenised text, or tokenised with `tokenize="none"`.
        references: the same number, tokenised likewise.
        tokenize: sacrebleu's name of BLEU's tokeniser; `"none"` splits at
            spaces. Defaults to `"13a"`.
        num_resamples: int, resampled corpora for the intervals; 0 for none.
            Sacrebleu's own seed is used. Defaults to `0`.

    Raises:
        ImportError: sacrebleu is not installed.
        ValueError: the numbers of sentences differ, there are none, or a
            setting is unknown.
    """
    try:
        from sacrebleu.metrics import BLEU
        from sacrebleu.metrics import CHRF
    except ImportError as error:
        raise ImportError(
            f"BLEU and chrF need sacrebleu ({error}). Install it with "
            "`pip install moe_tf[translation]`."
        ) from error
    if len(translations) != len(references) or not translations:
        raise ValueError(
            "`translations` and `references` must be equally many, and not "
            f"none. Received: {len(translations)} and {len(references)}"
        )
    if tokenize not in BLEU.TOKENIZERS:
        raise ValueError(
            f"`tokenize` must be one of {', '.join(BLEU.TOKENIZERS)}. "
            f"Received: tokenize={tokenize!r}"
        )
    checks.at_least("num_resamples", num_resamples, 0)
    if num_resamples == 1:
        raise ValueError("`num_resamples` must be 0 or at least 2. Received: 1")
    # `force` keeps sacrebleu from warning of text that is tokenised.
    metrics = BLEU(tokenize=tokenize, force=tokenize == "none"), CHRF()
    scores, signatures, intervals = [], [], []
    for metric in metrics:
        score = metric.corpus_score(
            translations, [references], n_bootstrap=max(num_resamples, 1)
        )
        scores.append(score.score)
        signatures.append(str(metric.get_signature()))
        intervals.append(
            _interval(score, signatures[-1]) if num_resamples else None
        )
    return CorpusScores(*scores, *signatures, *intervals)


def _interval(score, signature):
    """Reads the bootstrap's confidence interval from sacrebleu's JSON."""
    fields = json.loads(score.format(6, signature=signature, is_json=True))
    # Absent where every resampled corpus scores 0.
    mean = fields.get("confidence_mean", 0.0)
    half = fields.get("confidence_var", 0.0)
    return mean - half, mean + half
