"""The words that each expert of a trained model gets, as in table 9."""

from moe_tf import special_ids
from moe_tf.data.parallel import batching
from moe_tf.data.parallel import preparation
from moe_tf.evaluation import expert_words
from moe_tf.evaluation import expert_words_report
from moe_tf.layers import recorded_gates
from moe_tf.layers.moe import SparseMoE
from moe_tf.models.translation.scorer import TranslationScorer
from moe_tf.training.translation.task import TranslationTask


def make_report(
    task: TranslationTask,
    scorer: TranslationScorer,
    prepared: preparation.PreparedPairs,
) -> tuple[str, str]:
    """Runs test text through the model, and reports a layer's experts.

    Args:
        task: `TranslationTask`; `config.experts` says which layer and experts.
        scorer: its `TranslationScorer`, trained.
        prepared: its `PreparedPairs`.

    Returns:
        The report as text, and as an HTML page.

    Raises:
        ValueError: the model has no such layer, or the layer no such expert.
    """
    settings = task.config.experts
    layer = _layer(scorer, settings.layer)
    words = expert_words.ExpertWords(layer.num_experts, settings.places)
    several = len(prepared.corpus.pairs) > 1
    for pair in prepared.corpus.pairs:
        sides = task.texts(prepared, "test", pair, settings.sentences)
        _read(task, scorer, prepared, pair, sides, layer, words, several)
    chosen = {layer.name: _chosen(words, settings)}
    by_layer = {layer.name: words}
    return (
        expert_words_report.expert_words_as_text(by_layer, chosen),
        expert_words_report.expert_words_as_html(by_layer, chosen),
    )


def _layer(scorer, name):
    layers = {
        layer.name: layer
        for layer in scorer.translation_model._flatten_layers()
        if isinstance(layer, SparseMoE)
    }
    if not layers:
        raise ValueError(
            "`mode`=experts is for variants with a choice of experts; "
            "`model.variant` has none."
        )
    if name and name not in layers:
        raise ValueError(
            f"`experts.layer` must be one of {', '.join(layers)}, or empty "
            f"for the first. Received: experts.layer={name}"
        )
    return layers[name or next(iter(layers))]


def _read(task, scorer, prepared, pair, sides, layer, words, several):
    size = task.config.translate.batch_size
    language = task.language(prepared, pair)
    sources, targets = sides
    for first in range(0, len(sources), size):
        part = slice(first, first + size)
        inputs, *_ = batching.encode_pairs(
            prepared, sources[part], targets[part], language
        )
        with recorded_gates(scorer) as gates:
            scorer(inputs)
        side = "source" if layer.name.startswith("encoder") else "tokens"
        rows = _pieces(prepared.wordpieces, inputs[side])
        names = [pair.target] * len(rows) if several else None
        (recorded,) = gates[layer.name]
        words.add(rows, *recorded, names)


def _pieces(wordpieces, ids_BL):
    """The pieces of each row, without padding."""
    return [
        [wordpieces.pieces[i] for i in row if i != special_ids.PAD]
        for row in ids_BL
    ]


def _chosen(words, settings):
    if not settings.experts:
        return words.choose(settings.num_experts, by="peakedness")
    try:
        return [int(number) for number in settings.experts.split(",")]
    except ValueError as error:
        raise ValueError(
            "`experts.experts` must be numbers, comma separated. "
            f"Received: experts.experts={settings.experts}"
        ) from error
