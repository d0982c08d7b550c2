"""BLEU and chrF of translations, by sacrebleu."""

import json
import typing
from collections.abc import Sequence

from moe_tf import checks


class CorpusScores(typing.NamedTuple):
    """Scores of a corpus, 0 to 100, and how they were computed.

    Attributes:
        bleu: float.
        chrf: float, chrF2.
        bleu_signature: what else decides about the score, in sacrebleu's
            words; to be reported beside it.
        chrf_signature: likewise.
        bleu_interval: `(low, high)`, 95 % by bootstrap; `None` unless asked
            for.
        chrf_interval: likewise.
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
    """Mean and half width of the bootstrap, as sacrebleu's JSON has them."""
    written = json.loads(score.format(6, signature=signature, is_json=True))
    # Absent where every resampled corpus scores 0.
    mean = written.get("confidence_mean", 0.0)
    half = written.get("confidence_var", 0.0)
    return mean - half, mean + half
