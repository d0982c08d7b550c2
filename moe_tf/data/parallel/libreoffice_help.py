"""The default parallel text: LibreOffice's help in twenty languages.

    python -m moe_tf.data.parallel.libreoffice_help --languages=de,fr --out=DIR

downloads Debian's packages `libreoffice-help-*` with apt-get, without
installing them, and aligns the paragraphs by their ids, which are the same in
all languages. LibreOffice 7.4 gives 28,691 English lines of 16 words, of which
14 to 28 thousand are translated, by language. The text is under the MPL-2.0.

The folder has a `<language>.txt.gz` for each language and for `en`, with one
paragraph a line. Lines of the same number are translations of each other; an
empty line has no translation. `meta.tsv.gz` has the split (`train`, `dev`,
`test`), the page and the paragraph's id of each line.
"""

import argparse
import contextlib
import gzip
import hashlib
import html
import os
import re
import tempfile
from collections.abc import Iterator
from collections.abc import Sequence

from absl import logging

from moe_tf import files
from moe_tf.data.parallel import debian_packages

ENGLISH = "en"

# Percentages of the pages: in test, and in test and dev together.
_TEST, _HELD_OUT = 2, 4

_PAGE = re.compile(r"usr/share/libreoffice/help/([^/]+)/text/(.+)\.html")
_PARAGRAPH = re.compile(
    r'<(p|h\d)\b[^>]*?\bid="((?:par|hd)_id[^"]*)"[^>]*>(.*?)</\1>', re.DOTALL
)
_SPAN = re.compile(r"<span\b[^>]*>|</span>")
# Text for another than the default system, such as the keys of a Mac.
_HIDDEN = re.compile(r'(?=.*hidden="true")(?!.*\bid="default)', re.DOTALL)
_BREAK = re.compile(r"<br\s*/?>")
_TAG = re.compile(r"<[^>]*>")
# A paragraph that reads differently in each application.
_APPLICATION_SWITCH = 'id="swlnappl'


def languages_of(folder: str) -> list[str]:
    """Returns the languages in a folder of `write_corpus`, sorted."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(
        name.removesuffix(".txt.gz")
        for name in names
        if name.endswith(".txt.gz")
    )


def check_language(language: str, folder: str) -> None:
    """Checks that a folder of `write_corpus` has a language.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder lacks the language.
    """
    if not os.path.exists(_meta(folder)):
        raise FileNotFoundError(
            "`data.path` must be a folder that `python -m "
            "moe_tf.data.parallel.libreoffice_help` made, with a meta.tsv.gz. "
            f"Received: {folder!r}"
        )
    languages = languages_of(folder)
    if language not in languages:
        raise ValueError(
            f"`data.pairs` names {language!r}, but {folder} has {languages}."
        )


def write_corpus(
    languages: Sequence[str], folder: str, packages: str | None = None
) -> None:
    """Writes the corpus in some languages and English to a folder.

    Nothing is done if all these languages are there. Otherwise all languages
    in the folder are written again, from packages of the same version.

    Args:
        languages: such as `["de", "pt-BR"]`.
        folder: made if it does not exist.
        packages: optional folder of `.deb` files, instead of a download.

    Raises:
        FileNotFoundError: there is no apt-get, or `packages` lacks a package.
        OSError: a package cannot be downloaded, or the disk is full.
        ValueError: Debian has no translation to a language, or a package
            cannot be read or has another layout.
    """
    if "sk" in languages:
        raise ValueError(
            "`languages` must not have 'sk': Debian's Slovak help is a copy "
            "of the Czech."
        )
    there = languages_of(folder)
    if os.path.exists(_meta(folder)) and {ENGLISH, *languages} <= set(there):
        return
    wanted = list(dict.fromkeys([ENGLISH, *languages, *there]))
    names = [_package(language) for language in wanted]
    with tempfile.TemporaryDirectory() as temporary:
        if packages is None:
            logging.info("Downloading %s", ", ".join(names))
            debian_packages.download_packages(names, temporary)
        paths = {
            language: debian_packages.find_package(name, packages or temporary)
            for language, name in zip(wanted, names, strict=True)
        }
        _write(paths, folder)


def _meta(folder):
    return os.path.join(folder, "meta.tsv.gz")


def _package(language):
    code = "en-us" if language == ENGLISH else language.lower()
    return f"libreoffice-help-{code}"


def _write(paths, folder):
    """Aligns the packages at `paths`, by language, and writes `folder`."""
    english = dict(_paragraphs(paths[ENGLISH]))
    rows = list(_prose(english))
    if not rows:
        raise ValueError(
            f"{paths[ENGLISH]} has no paragraph where LibreOffice 7.4 has "
            "them: its layout is another."
        )
    os.makedirs(folder, exist_ok=True)
    # Written last: a folder without it is written again.
    with contextlib.suppress(FileNotFoundError):
        os.remove(_meta(folder))
    texts = [english[row] for row in rows]
    for language, path in paths.items():
        lines = texts
        if language != ENGLISH:
            translated = dict(_paragraphs(path))
            # A text that equals the English is not translated.
            lines = [
                "" if translated.get(row) == text else translated.get(row, "")
                for row, text in zip(rows, texts, strict=True)
            ]
        _write_lines(os.path.join(folder, f"{language}.txt.gz"), lines)
        logging.info(
            "%s: %d of %d lines from %s",
            language,
            len(lines) - lines.count(""),
            len(lines),
            os.path.basename(path),
        )
    _write_lines(
        _meta(folder),
        [f"{split_of(page)}\t{page}\t{name}" for page, name in rows],
    )


def split_of(page: str) -> str:
    """Returns the split of a page such as `"swriter/guide/text_rotate"`."""
    hundredth = int(hashlib.md5(page.encode()).hexdigest(), 16) % 100
    if hundredth < _TEST:
        return "test"
    return "dev" if hundredth < _HELD_OUT else "train"


def _prose(english) -> Iterator[tuple[str, str]]:
    """Yields the first of equal paragraphs of prose, page by page."""
    seen = set()
    for (page, name), text in sorted(
        english.items(), key=lambda item: _place(item[0][0])
    ):
        letters = sum(sign.isalpha() or sign == " " for sign in text)
        is_prose = len(text.split()) >= 3 and letters >= 0.6 * len(text)
        if is_prose and text not in seen:
            seen.add(text)
            yield page, name


def _place(page):
    """Returns a sort key: pages of a folder come before its subfolders."""
    *folders, name = page.split("/")
    return [(1, folder) for folder in folders] + [(0, f"{name}.html")]


def _paragraphs(path) -> Iterator[tuple[tuple[str, str], str]]:
    """Yields page, id and text of a package's paragraphs, each id once."""
    for name, data in debian_packages.read_files(path):
        if not (match := _PAGE.fullmatch(name)):
            continue
        page = match[2]
        content = data.decode("utf-8").partition('id="DisplayArea"')[2]
        seen = set()
        for _, identity, inside in _PARAGRAPH.findall(content):
            if _APPLICATION_SWITCH in inside or identity in seen:
                continue
            if text := _text(inside):
                seen.add(identity)
                yield (page, identity), text


def _text(inside: str) -> str:
    """Returns the text of a paragraph that the default system shows."""
    visible = []
    hides = []  # for each open span, whether it hides its text
    position = 0
    for match in _SPAN.finditer(inside):
        if not any(hides):
            visible.append(inside[position : match.start()])
        position = match.end()
        if match[0] != "</span>":
            hides.append(bool(_HIDDEN.match(match[0])))
        elif hides:
            hides.pop()
    visible.append(inside[position:])
    text = _TAG.sub("", _BREAK.sub(" ", "".join(visible)))
    return " ".join(html.unescape(text).split())


def _write_lines(path, lines):
    data = "".join(f"{line}\n" for line in lines).encode()
    with files.replace(path) as file:
        file.write(gzip.compress(data, mtime=0))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command of the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m moe_tf.data.parallel.libreoffice_help",
        description="Makes parallel text of LibreOffice's help.",
    )
    parser.add_argument(
        "--languages", required=True, help="such as de,fr,pt-BR; en is added"
    )
    parser.add_argument("--out", required=True, help="folder to write to")
    parser.add_argument(
        "--packages", help="folder of .deb files; downloaded if not given"
    )
    chosen = parser.parse_args(arguments)
    logging.set_verbosity(logging.INFO)
    try:
        write_corpus(
            [name for name in chosen.languages.split(",") if name],
            chosen.out,
            chosen.packages,
        )
    except (OSError, ValueError) as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
