"""Gets Debian packages and reads the files inside, without installing."""

import io
import lzma
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from collections.abc import Sequence

_MAGIC = b"!<arch>\n"


def download_packages(names: Sequence[str], folder: str) -> None:
    """Lets `apt-get download` put packages into a folder; needs no root.

    Raises:
        FileNotFoundError: the machine has no apt-get.
        OSError: apt-get failed; the message has what it said.
    """
    by_hand = (
        "Or get the .deb files on another machine, and give their folder to "
        "`python -m moe_tf.data.parallel.libreoffice_help --packages`."
    )
    if shutil.which("apt-get") is None:
        raise FileNotFoundError(
            f"apt-get, which downloads {', '.join(names)}, is not on this "
            f"machine: it comes with Debian and its relatives. {by_hand}"
        )
    done = subprocess.run(
        ["apt-get", "download", *names],
        cwd=folder,
        env={**os.environ, "LC_ALL": "C"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise OSError(
            f"`apt-get download {' '.join(names)}` failed: "
            f"{done.stderr.strip()} Run `apt-get update` if a package is not "
            "found, and look for those that there are with `apt-cache search "
            f"{os.path.commonprefix(list(names)) or names[0]}`. {by_hand}"
        )


def find_package(name: str, folder: str) -> str:
    """The path of the one `<name>_<version>_<architecture>.deb` in a folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there are several.
    """
    found = [
        os.path.join(folder, file)
        for file in sorted(os.listdir(folder))
        if re.fullmatch(rf"{re.escape(name)}_.*\.deb", file)
    ]
    if not found:
        raise FileNotFoundError(
            f"{folder} lacks the package {name}: a file {name}_*.deb."
        )
    if len(found) > 1:
        raise ValueError(f"{folder} has several versions of {name}: {found}")
    return found[0]


def read_files(path: str) -> Iterator[tuple[str, bytes]]:
    """Yields the name and the bytes of every regular file in a package.

    Raises:
        ValueError: the file is no whole package, or is compressed with what
            Python cannot read.
    """
    with open(path, "rb") as file:
        name, data = _data(file, path)
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:*") as archive:
            for member in archive:
                if member.isfile():
                    content = archive.extractfile(member).read()
                    yield member.name.removeprefix("./"), content
    except (tarfile.TarError, lzma.LZMAError, EOFError, OSError) as error:
        raise ValueError(
            f"The {name} in {path} cannot be read ({error}). Download the "
            "package again; xz, gzip and bzip2 can be read, zstd cannot."
        ) from error


def _data(file, path):
    """Name and bytes of the member `data.tar.*` of the `ar` archive."""
    if file.read(len(_MAGIC)) == _MAGIC:
        while len(header := file.read(60)) == 60:
            name = header[:16].decode("ascii", "replace").strip().rstrip("/")
            size = int(header[48:58])
            data = file.read(size + size % 2)
            if name.startswith("data.tar") and len(data) >= size:
                return name, data[:size]
    raise ValueError(
        f"{path} is not a whole Debian package. Download it again."
    )
