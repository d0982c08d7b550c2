import gzip
import io
import os
import tarfile

import pytest

from moe_tf.data.parallel import debian_packages
from moe_tf.data.parallel import libreoffice_help

SWITCH = (
    '<span id="default1" class="switch">Ctrl</span>'
    '<span hidden="true" id="MAC1"><span class="a">Command</span> key</span>'
)

ENGLISH = {
    "swriter/main": [
        '<p id="par_id1">Press {}+A to <b>select</b> all &amp; everything</p>',
        '<h2 id="hd_id2">A  long\n title<br/>in two rows</h2>',
        '<p id="par_id3">Too short</p>',
        '<p id="par_id4">1234 5678 9012 3456 no prose</p>',
        '<p id="par_id5">Never <i id="swlnappl1">in Writer</i> that is</p>',
        '<p id="par_id6" class="icon"><img src="x.png"></p>',
        '<p id="par_id6">The text beside the icon</p>',
        '<p class="other">Not one with an id</p>',
    ],
    "swriter/01/first": [
        '<p id="par_id1">The text beside the icon</p>',
        '<p id="par_id7">The same in every language</p>',
    ],
    "swriter/main-more": ['<p id="par_id1">A page before the other</p>'],
}
GERMAN = {
    "swriter/main": [
        '<p id="par_id1">Mit {}+A alles ausw&auml;hlen</p>',
        '<h2 id="hd_id2">Ein langer Titel</h2>',
        '<p id="par_id6">Der Text neben dem Symbol</p>',
    ],
    "swriter/01/first": [
        '<p id="par_id7">The same in every language</p>',
    ],
}


def page(blocks):
    body = "\n".join(blocks).replace("{}", SWITCH)
    return (
        '<html><p id="par_id1">Not in the display area</p>'
        f'<div id="DisplayArea" class="x">{body}</div></html>'
    )


def package(path, files, mode="w:xz"):
    """Writes a `.deb` with these files."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=mode) as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    members = {
        "debian-binary": b"2.0\n",
        "control.tar.xz": b"odd",
        f"data.tar.{mode[2:]}": data.getvalue(),
    }
    with open(path, "wb") as file:
        file.write(b"!<arch>\n")
        for name, content in members.items():
            header = (
                f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}"
            )
            file.write(header.encode() + b"`\n" + content)
            file.write(b"\n" * (len(content) % 2))


def help_package(folder, language, pages, version="4%3a7.4", **kwargs):
    code = {"en-US": "en-us"}.get(language, language.lower())
    package(
        folder / f"libreoffice-help-{code}_{version}_all.deb",
        {
            "usr/share/doc/readme": "x",
            **{
                f"usr/share/libreoffice/help/{language}/text/{name}.html": page(
                    blocks
                )
                for name, blocks in pages.items()
            },
        },
        **kwargs,
    )


@pytest.fixture
def packages(tmp_path):
    folder = tmp_path / "packages"
    folder.mkdir()
    help_package(folder, "en-US", ENGLISH)
    help_package(folder, "de", GERMAN)
    help_package(folder, "pt-BR", {}, mode="w:gz")
    return folder


def read(folder, name):
    with gzip.open(os.path.join(folder, name)) as file:
        return file.read().decode().split("\n")[:-1]


def test_paragraphs_align_by_page_and_id(packages, tmp_path):
    out = str(tmp_path / "out")
    libreoffice_help.write_corpus(["de", "pt-BR"], out, str(packages))
    assert libreoffice_help.languages_of(out) == ["de", "en", "pt-BR"]
    # Files before folders, and `main-more.html` before `main.html`.
    assert read(out, "en.txt.gz") == [
        "A page before the other",
        "Press Ctrl+A to select all & everything",
        "A long title in two rows",
        "The text beside the icon",
        "The same in every language",
    ]
    assert read(out, "de.txt.gz") == [
        "",
        "Mit Ctrl+A alles auswählen",
        "Ein langer Titel",
        "Der Text neben dem Symbol",
        "",
    ]
    assert read(out, "pt-BR.txt.gz") == [""] * 5
    rows = [row.split("\t") for row in read(out, "meta.tsv.gz")]
    assert [row[1:] for row in rows] == [
        ["swriter/main-more", "par_id1"],
        ["swriter/main", "par_id1"],
        ["swriter/main", "hd_id2"],
        ["swriter/main", "par_id6"],
        ["swriter/01/first", "par_id7"],
    ]
    assert {row[0] for row in rows} <= {"train", "dev", "test"}


def test_pages_are_held_out_by_their_name():
    names = [f"swriter/{index}" for index in range(5000)]
    splits = [libreoffice_help.split_of(name) for name in names]
    assert 0.01 < splits.count("test") / 5000 < 0.03
    assert 0.01 < splits.count("dev") / 5000 < 0.03
    # As in the frozen corpus.
    assert libreoffice_help.split_of("sbasic/guide/access2base") == "train"


def test_what_is_there_is_not_made_again(packages, tmp_path):
    out = str(tmp_path / "out")
    libreoffice_help.write_corpus(["de"], out, str(packages))
    before = os.stat(f"{out}/de.txt.gz").st_mtime_ns
    libreoffice_help.write_corpus(["de", "en"], out, "no such folder")
    assert os.stat(f"{out}/de.txt.gz").st_mtime_ns == before


def test_another_language_makes_all_anew(packages, tmp_path):
    out = str(tmp_path / "out")
    libreoffice_help.write_corpus(["de"], out, str(packages))
    os.remove(packages / "libreoffice-help-en-us_4%3a7.4_all.deb")
    fewer = {"swriter/main": ENGLISH["swriter/main"]}
    help_package(packages, "en-US", fewer, version="7.5")
    libreoffice_help.write_corpus(["pt-BR"], out, str(packages))
    for name in ("en", "de", "pt-BR"):
        assert len(read(out, f"{name}.txt.gz")) == 3


def test_a_folder_cut_short_is_made_again(packages, tmp_path, monkeypatch):
    out = str(tmp_path / "out")
    libreoffice_help.write_corpus(["de"], out, str(packages))
    write = libreoffice_help._write_lines

    def fail(path, lines):
        if path.endswith("de.txt.gz"):
            raise OSError(28, "No space left on device")
        write(path, lines)

    monkeypatch.setattr(libreoffice_help, "_write_lines", fail)
    with pytest.raises(OSError, match="No space left"):
        libreoffice_help.write_corpus(["pt-BR"], out, str(packages))
    with pytest.raises(FileNotFoundError, match="`data.path`"):
        libreoffice_help.check_language("de", out)
    monkeypatch.undo()
    libreoffice_help.write_corpus(["de"], out, str(packages))
    libreoffice_help.check_language("de", out)


def fake_apt(folder, script, monkeypatch):
    folder.mkdir()
    path = folder / "apt-get"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_apt_get_downloads_without_installing(packages, tmp_path, monkeypatch):
    copy = f'for name in "$@"; do cp {packages}/"$name"_* .; done'
    script = f'[ "$1" = download ] && shift && {copy}'
    fake_apt(tmp_path / "bin", script, monkeypatch)
    monkeypatch.chdir(tmp_path)
    libreoffice_help.main(["--languages=de", "--out=out"])
    assert read("out", "de.txt.gz")[1] == "Mit Ctrl+A alles auswählen"
    assert sorted(os.listdir()) == ["bin", "out", "packages"]


def test_what_apt_get_says_is_told(tmp_path, monkeypatch, capsys):
    fake_apt(
        tmp_path / "bin",
        "echo 'E: Unable to locate package' $2 >&2; exit 100",
        monkeypatch,
    )
    with pytest.raises(SystemExit) as exit:
        libreoffice_help.main(["--languages=xx", f"--out={tmp_path}/out"])
    assert exit.value.code == 1
    said = capsys.readouterr().err
    assert "Unable to locate package libreoffice-help-en-us" in said
    assert "apt-get update" in said
    assert "--packages" in said
    assert not os.path.exists(tmp_path / "out")


def test_a_machine_without_apt_get_is_told_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="apt-get.*--packages"):
        libreoffice_help.write_corpus(["de"], str(tmp_path / "out"))


def test_slovak_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'sk'.*Czech"):
        libreoffice_help.write_corpus(["de", "sk"], str(tmp_path / "out"))


def test_a_missing_or_doubled_package_is_named(packages, tmp_path):
    out = str(tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="libreoffice-help-fr"):
        libreoffice_help.write_corpus(["fr"], out, str(packages))
    help_package(packages, "de", {}, version="7.5")
    with pytest.raises(ValueError, match="several versions.*-de"):
        libreoffice_help.write_corpus(["de"], out, str(packages))


def test_a_package_of_another_layout_is_refused(packages, tmp_path):
    path = packages / "libreoffice-help-en-us_4%3a7.4_all.deb"
    package(path, {"usr/share/doc/readme": "x"})
    with pytest.raises(ValueError, match="en-us.*its layout is another"):
        libreoffice_help.write_corpus(
            ["de"], str(tmp_path / "out"), str(packages)
        )


@pytest.mark.parametrize("size", [0, 5, 70, 200, -9])
def test_a_cut_off_package_is_named(packages, size):
    path = packages / "libreoffice-help-de_4%3a7.4_all.deb"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="libreoffice-help-de.*again"):
        list(debian_packages.read_files(str(path)))


def test_a_compression_that_cannot_be_read_is_said(tmp_path):
    path = str(tmp_path / "a_1_all.deb")
    package(path, {"x": "y"})
    with open(path, "rb") as file:
        content = file.read()
    with open(path, "wb") as file:
        file.write(content.replace(b"\xfd7zXZ", b"\x28\xb5\x2f\xfd\x00"))
    with pytest.raises(
        ValueError, match="(?s)a_1_all.deb cannot be read.*zstd"
    ):
        list(debian_packages.read_files(path))
