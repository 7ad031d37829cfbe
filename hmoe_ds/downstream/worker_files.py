"""Files that worker processes load: what decides what is computed with them, and whether they are still the same."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

import hmoe_ds
from data_pipeline.errors import PipelineError
from data_pipeline.execution.task import digest
from data_pipeline.keys import file_checksum


@dataclass(frozen=True)
class WorkerFiles:
    """Files of a model or a predictor, as they were when they were looked at.

    Args:
        folder: on this machine.
        names: of the files, relative to the folder.
        contents: changes with what is in them.
        identity: changes with that, and with the code that runs it.
        stamps: size and time of each.
    """

    folder: str
    names: tuple[str, ...]
    contents: str
    identity: str
    stamps: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, folder: Path, names: Iterable[str]) -> WorkerFiles:
        """Look at the files, which are read for it."""
        names = tuple(names)
        contents = digest(*(file_checksum(folder / name) for name in names))
        code = (path.read_bytes() for path in sorted(Path(hmoe_ds.__file__).parent.rglob("*.py")))
        identity = digest(contents, *code, torch.__version__)
        return cls(str(folder), names, contents, identity, _stamps(folder, names))

    @property
    def are_unchanged(self) -> bool:
        """Whether they are the same, as far as size and time tell."""
        return _stamps(Path(self.folder), self.names) == self.stamps

    def check(self) -> None:
        """Raise PipelineError unless they are the same."""
        if not self.are_unchanged:
            raise PipelineError(
                f"{self.folder} has changed while it was used: start again, which begins anew with what is there"
            )


def _stamps(folder: Path, names: Iterable[str]) -> tuple[tuple[int, int], ...]:
    found = [(folder / name).stat() for name in names]
    return tuple((each.st_size, each.st_mtime_ns) for each in found)
