import glob
import os


def languages_of(folder: str) -> list[str]:
    """The languages of a prepared folder, sorted."""
    found = glob.glob(os.path.join(glob.escape(folder), "*.txt.gz"))
    return sorted(
        os.path.basename(path).removesuffix(".txt.gz") for path in found
    )


def check_language(language: str, folder: str) -> None:
    """Raises an error unless the prepared `folder` has `language`."""
    if not os.path.exists(os.path.join(folder, "meta.tsv.gz")):
        raise FileNotFoundError(
            "`data.path` must be a folder that `python -m "
            "moe_tf.data.libreoffice_help` made, with a meta.tsv.gz. "
            f"Received: {folder!r}"
        )
    if language not in (found := languages_of(folder)):
        raise ValueError(
            f"`data.pairs` names {language!r}, but {folder} has {found}."
        )


def make(languages, folder):
    raise NotImplementedError
