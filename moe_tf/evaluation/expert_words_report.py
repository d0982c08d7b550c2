"""Table 9 as text and as a page for a browser."""

import html
from collections.abc import Mapping
from collections.abc import Sequence

import numpy as np

from moe_tf.evaluation.expert_words import ExpertWords

_WORD_START = "\u2581"  # as sentencepiece marks it

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem; color: #222; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
.experts { display: flex; flex-wrap: wrap; gap: 1.5rem; }
.expert { border: 1px solid #ccc; border-radius: 6px; padding: .6rem 1rem; }
.expert h3 { font-size: 1rem; margin: 0; }
.expert p { color: #666; font-size: .85rem; margin: 0 0 .4rem; }
table { border-collapse: collapse; }
td, th { padding: .1rem .6rem; text-align: left; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.weight { color: #888; }
tr.all { border-top: 1px solid #888; }
"""


def expert_words_as_text(
    layers: Mapping[str, ExpertWords], experts: Mapping[str, Sequence[int]]
) -> str:
    """Formats the examples of chosen experts as text.

    The routed token is in `**bold**`; pieces are separated by spaces.

    Example:

    >>> words = moe_tf.evaluation.ExpertWords(num_experts=2, context=1)
    >>> words.add(
    ...     [["the", "cat", "sat"]],
    ...     weight_TK=np.array([[0.9], [0.8], [0.6]]),
    ...     expert_TK=np.array([[0], [1], [1]]),
    ... )
    >>> print(moe_tf.evaluation.expert_words_as_text(
    ...     {"moe": words}, {"moe": [0]}
    ... ).strip())
    moe, expert 0: 1 tokens, 39.13 % of gate values
        0.900  **the** cat

    Args:
        layers: `ExpertWords` by the name of the layer.
        experts: for each of these names, the experts to show.

    Raises:
        ValueError: an expert is not one of the layer's.
    """
    lines = []
    for name, words in layers.items():
        _check_experts(name, words, experts[name])
        fractions = words.language_fractions()
        for expert in experts[name]:
            lines.append(f"{name}, expert {expert}: {_summary(words, expert)}")
            if words.languages:
                own = _format_fractions(words.languages, fractions[expert])
                lines.append(f"    {own}")
            for example in words.examples(expert):
                parts = _format_example(
                    example, lambda piece: piece, "**", "**"
                )
                lines.append(f"    {example.weight:.3f}  {parts}")
            lines.append("")
        if words.languages:
            all_fractions = _format_fractions(words.languages, fractions[-1])
            lines += [f"{name}, all experts: {all_fractions}", ""]
    return "\n".join(lines)


def expert_words_as_html(
    layers: Mapping[str, ExpertWords],
    experts: Mapping[str, Sequence[int]],
    title: str = "What each expert is for",
) -> str:
    """Formats the examples of chosen experts as an HTML page of one file.

    Example:

    >>> words = moe_tf.evaluation.ExpertWords(num_experts=2)
    >>> words.add([["cat"]], np.array([[0.9]]), np.array([[0]]))
    >>> page = moe_tf.evaluation.expert_words_as_html(
    ...     {"moe": words}, {"moe": [0]}
    ... )
    >>> "<b>cat</b>" in page
    True

    Args:
        layers: `ExpertWords` by the name of the layer.
        experts: for each of these names, the experts to show.
        title: str.

    Raises:
        ValueError: an expert is not one of the layer's.
    """
    sections = []
    for name, words in layers.items():
        _check_experts(name, words, experts[name])
        cards = "\n".join(_card(words, expert) for expert in experts[name])
        sections.append(
            f"<h2>{html.escape(name)}</h2>\n"
            f'<div class="experts">\n{cards}\n</div>'
        )
        if words.languages:
            sections.append(_language_table(words, experts[name]))
    body = "\n".join(sections)
    title = html.escape(title)
    return (
        '<!DOCTYPE html>\n<html>\n<head>\n<meta charset="utf-8">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<h1>{title}</h1>\n{body}\n</body>\n</html>\n"
    )


def _check_experts(name, words, experts):
    for expert in experts:
        if not 0 <= expert < words.num_experts:
            raise ValueError(
                f"`experts` of {name} must be between 0 and "
                f"{words.num_experts - 1}. Received: {expert}"
            )


def _card(words, expert):
    rows = "\n".join(map(_card_row, words.examples(expert)))
    return (
        f'<div class="expert">\n<h3>Expert {expert}</h3>\n'
        f"<p>{_summary(words, expert)}</p>\n<table>\n{rows}\n</table>\n</div>"
    )


def _card_row(example):
    text = _format_example(example, html.escape, "<b>", "</b>")
    return (
        f'<tr><td class="number weight">{example.weight:.3f}</td>'
        f'<td dir="auto">{text}</td></tr>'
    )


def _language_table(words, experts):
    fractions = words.language_fractions()
    head = "".join(
        f'<th class="number">{html.escape(language)}</th>'
        for language in words.languages
    )
    rows = [
        _language_row(f"Expert {expert}", fractions[expert])
        for expert in experts
    ]
    rows.append(_language_row("All experts", fractions[-1], ' class="all"'))
    lines = "\n".join(rows)
    return (
        "<h3>Share of each language in the gate values, %</h3>\n"
        f"<table>\n<tr><th></th>{head}</tr>\n{lines}\n</table>"
    )


def _language_row(name, fractions, attributes=""):
    cells = "".join(
        f'<td class="number" style="background: rgba(30, 110, 200, '
        f'{0.6 * fraction:.3f})">{100 * fraction:.1f}</td>'
        for fraction in fractions
    )
    return f"<tr{attributes}><th>{name}</th>{cells}</tr>"


def _summary(words, expert):
    total = words.importance_E.sum()
    fraction = words.importance_E[expert] / total if total else 0.0
    num_tokens = words.tokens_E[expert]
    return f"{num_tokens:,} tokens, {100 * fraction:.2f} % of gate values"


def _format_fractions(languages, fractions):
    order = np.argsort(-fractions, kind="stable")
    return ", ".join(
        f"{languages[i]} {100 * fractions[i]:.1f} %" for i in order
    )


def _format_example(example, escape, start, end):
    """A token in its context, pieces separated by spaces."""
    piece = f"{start}{escape(_plain(example.piece))}{end}"
    before, after = (
        [escape(_plain(piece)) for piece in side]
        for side in (example.before, example.after)
    )
    return " ".join([*before, piece, *after])


def _plain(piece):
    """A piece without the mark of a word's start, unless it is only that."""
    return piece.replace(_WORD_START, "") or piece
