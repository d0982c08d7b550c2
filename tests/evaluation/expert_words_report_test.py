import html.parser

import numpy as np
import pytest

from moe_tf.evaluation import expert_words
from moe_tf.evaluation import expert_words_report as report


def layers(languages=("en", "de")):
    words = expert_words.ExpertWords(2, num_examples=2)
    words.add(
        [["\u2581to", "\u2581swift", "ly"], ["\u2581a<b>", "&", "\u2581"]],
        np.array([[0.1], [0.9], [0.2], [0.3], [0.25], [0.75]]),
        np.array([[1], [0], [1], [1], [1], [1]]),
        languages,
    )
    return {"encoder_moe": words}


class Page(html.parser.HTMLParser):
    """Checks that tags close, and collects bold text and table cells."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.bold, self.cells = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert tag not in ("script", "link", "img")
        if tag != "meta":
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "b" in self.open:
            self.bold.append(data)
        if "td" in self.open:
            self.cells[-1] += data


def test_text():
    text = report.expert_words_as_text(layers(), {"encoder_moe": [0, 1]})
    assert text.splitlines() == [
        "encoder_moe, expert 0: 1 tokens, 36.00 % of gate values",
        "    en 100.0 %, de 0.0 %",
        "    0.900  to **swift** ly",
        "",
        "encoder_moe, expert 1: 5 tokens, 64.00 % of gate values",
        "    de 81.2 %, en 18.8 %",
        "    0.750  a<b> & **\u2581**",
        "    0.300  **a<b>** & \u2581",
        "",
        "encoder_moe, all experts: de 52.0 %, en 48.0 %",
    ]


def test_page_shows_the_same_escaped():
    text = report.expert_words_as_html(
        layers(), {"encoder_moe": [1, 0]}, title="A & B"
    )
    page = Page(text)
    assert page.bold == ["\u2581", "a<b>", "swift"]
    assert page.cells == [
        *["0.750", "a<b> & \u2581", "0.300", "a<b> & \u2581"],
        *["0.900", "to swift ly"],
        *["81.2", "18.8", "0.0", "100.0", "52.0", "48.0"],
    ]
    assert "<title>A &amp; B</title>" in text
    assert "http" not in text


def test_without_languages_there_is_no_table_of_them():
    made = layers(languages=None)
    assert "%," not in report.expert_words_as_text(made, {"encoder_moe": [0]})
    page = Page(report.expert_words_as_html(made, {"encoder_moe": [0]}))
    assert page.cells == ["0.900", "to swift ly"]


def test_experts_without_tokens_and_layers_without_any():
    words = expert_words.ExpertWords(2)
    text = report.expert_words_as_text({"moe": words}, {"moe": [1]})
    assert text == "moe, expert 1: 0 tokens, 0.00 % of gate values\n"
    assert (
        Page(report.expert_words_as_html({"moe": words}, {"moe": [1]})).cells
        == []
    )


@pytest.mark.parametrize(
    "show", [report.expert_words_as_text, report.expert_words_as_html]
)
@pytest.mark.parametrize("expert", [-1, 2])
def test_refuses_experts_that_are_not_there(show, expert):
    with pytest.raises(ValueError, match="`experts` of encoder_moe must"):
        show(layers(), {"encoder_moe": [expert]})
