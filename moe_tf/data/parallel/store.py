"""Encoded sentence pairs in two flat files, for access in any order."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterable

import numpy as np

from moe_tf import files


@dataclasses.dataclass(frozen=True)
class PairStore:
    """The encoded sentence pairs of one language pair and split, in two files.

    `<path>.ids` has the piece ids of each source and then of its target, pair
    after pair, in little-endian uint16, or uint32 for a large vocabulary.
    `<path>.lengths` has the number of pieces of each side, in little-endian
    int32 `(N, 2)`. Symbols of languages, starts and ends are not stored.

    Attributes:
        path: of the two files, without their extensions.
        vocabulary_size: int, number of ids.
    """

    path: str
    vocabulary_size: int

    @classmethod
    def write(
        cls,
        path: str,
        vocabulary_size: int,
        chunks: Iterable[tuple[np.ndarray, np.ndarray]],
    ) -> "PairStore":
        """Writes the files atomically.

        Args:
            path: of the two files, without their extensions, in an existing
                folder.
            vocabulary_size: int, number of ids.
            chunks: int `(T,)` ids and int `(N, 2)` lengths of pairs.

        Raises:
            OSError: the folder cannot be written, or the disk is full.
        """
        store = cls(path, vocabulary_size)
        try:
            with contextlib.ExitStack() as stack:
                ids_file, lengths_file = (
                    stack.enter_context(files.replace(f"{path}.{ending}"))
                    for ending in ("ids", "lengths")
                )
                for ids, lengths in chunks:
                    ids_file.write(ids.astype(store._dtype).tobytes())
                    lengths_file.write(lengths.astype("<i4").tobytes())
        except OSError as error:
            if error.filename is None:
                raise OSError(
                    error.errno, f"{error.strerror} while writing", path
                ) from error
            raise
        return store

    @property
    def sizes(self) -> dict[str, int]:
        """Names and bytes of the two files; `-1` for a missing one."""
        sizes = {}
        for ending in ("ids", "lengths"):
            path = f"{self.path}.{ending}"
            sizes[os.path.basename(path)] = (
                os.path.getsize(path) if os.path.exists(path) else -1
            )
        return sizes

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """int32 `(N, 2)`: number of pieces of each source and target."""
        return _mapped(f"{self.path}.lengths", "<i4").reshape(-1, 2)

    @functools.cached_property
    def ids(self) -> np.ndarray:
        """uint16 or uint32 `(T,)`: the piece ids of all pairs."""
        return _mapped(f"{self.path}.ids", self._dtype)

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """int64 `(N,)`: the position in `ids` where each pair begins."""
        ends = np.cumsum(self.lengths.sum(axis=1, dtype=np.int64))
        return np.concatenate([[0], ends[:-1]]) if len(ends) else ends

    @property
    def _dtype(self):
        return "<u2" if self.vocabulary_size <= 1 << 16 else "<u4"

    def __len__(self) -> int:
        return len(self.lengths)


def _mapped(path, dtype):
    if not os.path.getsize(path):  # an empty file cannot be mapped
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, "r")
