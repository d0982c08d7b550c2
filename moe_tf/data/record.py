"""The record `data.json` of the settings and files that data came from."""

import json
import os
from collections.abc import Iterable
from typing import Any

import ml_collections

from moe_tf import files

_FILE_NAME = "data.json"


def write_record(workdir: str, fields: dict[str, Any]) -> None:
    """Writes the record of a run.

    Call it after all other files are written: a run without a record prepares
    its data again.

    Args:
        workdir: folder of the run.
        fields: `settings`, a dictionary by name, and whatever else
            `json.dump` takes.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    text = json.dumps(fields, indent=1)
    files.write(os.path.join(workdir, _FILE_NAME), text)


def is_recorded(workdir: str) -> bool:
    """Whether the folder of a run has a record."""
    return os.path.exists(os.path.join(workdir, _FILE_NAME))


class Record:
    """The record of an earlier call, to compare with the present.

    Args:
        workdir: folder of the run, which has a record.

    Attributes:
        fields: dictionary, as `write_record` took it.
    """

    def __init__(self, workdir: str) -> None:
        self.path = os.path.join(workdir, _FILE_NAME)
        with open(self.path, "rb") as file:
            self.fields = json.load(file)
        self.remedy = (
            f"Restore it, use another `workdir`, or delete {self.path}."
        )

    def check_settings(self, data_config: ml_collections.ConfigDict) -> None:
        """Raises `ValueError` unless all recorded settings are the same."""
        for name, recorded in self.fields["settings"].items():
            if getattr(data_config, name) != recorded:
                raise ValueError(
                    f"`data.{name}`={getattr(data_config, name)!r} differs "
                    f"from {recorded!r}, with which this run began. "
                    f"{self.remedy}"
                )

    def check_fingerprint(self, path: str, recorded: str, present: str) -> None:
        """Raises `ValueError` unless a file's fingerprints are the same."""
        if present != recorded:
            raise ValueError(
                f"{path} has changed since this run began: its fingerprint is "
                f"{present}, recorded is {recorded}. {self.remedy}"
            )

    def check_sizes(
        self,
        recorded: Iterable[tuple[str, int]],
        present: Iterable[tuple[str, int]],
        where: str,
    ) -> None:
        """Raises `ValueError` unless names and sizes of files are the same.

        Args:
            recorded: name and bytes of each file in the record.
            present: likewise, of the files there are now.
            where: of which data the files are, for the message.
        """
        recorded, present = list(recorded), list(present)
        if [name for name, _ in recorded] != [name for name, _ in present]:
            raise ValueError(
                f"The files {where} are others than those with which this run "
                f"began. {self.remedy} Received: "
                f"{[name for name, _ in present]}, recorded: "
                f"{[name for name, _ in recorded]}"
            )
        for (name, size), (_, new_size) in zip(recorded, present, strict=True):
            if size != new_size:
                raise ValueError(
                    f"{name} {where} has changed since this run began: "
                    f"{new_size} bytes, recorded {size}. {self.remedy}"
                )
