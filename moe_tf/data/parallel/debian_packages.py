"""Downloads Debian packages and reads their files, without installing."""

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
    """Downloads packages to a folder with `apt-get download`, without root.

    Raises:
        FileNotFoundError: the machine has no apt-get.
        OSError: apt-get failed; the message has its output.
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
    """Returns the path of `<name>_<version>_<architecture>.deb` in a folder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there are several.
    """
    paths = [
        os.path.join(folder, file)
        for file in sorted(os.listdir(folder))
        if re.fullmatch(rf"{re.escape(name)}_.*\.deb", file)
    ]
    if not paths:
        raise FileNotFoundError(
            f"{folder} lacks the package {name}: a file {name}_*.deb."
        )
    if len(paths) > 1:
        raise ValueError(f"{folder} has several versions of {name}: {paths}")
    return paths[0]


def read_files(path: str) -> Iterator[tuple[str, bytes]]:
    """Yields the name and the bytes of every regular file in a package.

    Raises:
        ValueError: the file is not a whole package, or has a compression that
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
    """Returns name and bytes of `data.tar.*` in the `ar` archive."""
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
