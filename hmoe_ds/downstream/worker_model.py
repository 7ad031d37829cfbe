"""An exported model in worker processes: each loads it once, and then it serves all tasks of that process."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

import hmoe_ds
from data_pipeline.errors import PipelineError
from data_pipeline.keys import file_checksum
from data_pipeline.task import digest
from hmoe_ds.model.hmoe import HMoEModel
from hmoe_ds.model.hub import find_model
from hmoe_ds.model.pretrained import CONFIG, WEIGHTS, read_description
from hmoe_ds.model.size import moe_layers


@dataclass(frozen=True)
class WorkerModel:
    """Where a model lies, and what decides what it computes.

    Args:
        folder: of the exported model, on this machine.
        weights: changes with its files.
        identity: changes with its files, and with the code that runs it.
        stamps: size and time of its files, to notice that they have changed.
        hidden_size: width D of its embeddings.
        layers: with experts.
        standardize: whether it was trained on molecules in their standard form.
    """

    folder: str
    weights: str
    identity: str
    stamps: tuple[tuple[int, int], ...]
    hidden_size: int
    layers: int
    standardize: bool

    @classmethod
    def of(cls, source: str | Path) -> WorkerModel:
        """The model at `source`, as of `HMoEModel.from_pretrained`.

        Raises:
            ModelFormatError: no exported model there.
        """
        folder = find_model(source).absolute()
        described = read_description(folder)
        weights = digest(*(file_checksum(folder / name) for name in (CONFIG, WEIGHTS)))
        code = (path.read_bytes() for path in sorted(Path(hmoe_ds.__file__).parent.rglob("*.py")))
        identity = digest(weights, *code, torch.__version__)
        standardize = described.training.get("standardize", True) is not False
        sizes = (described.model.hidden_size, moe_layers(described.model))
        return cls(str(folder), weights, identity, stamps_of(folder, (CONFIG, WEIGHTS)), *sizes, standardize)

    def loaded(self) -> tuple[HMoEModel, str]:
        """The model in this process, and the device on which it lies. A worker is one core.

        Raises:
            PipelineError: its files have changed since they were looked at.
        """
        torch.set_num_threads(1)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = _load(self.folder, self.identity, device)
        check_stamps(Path(self.folder), (CONFIG, WEIGHTS), self.stamps)
        return model, device


@cache
def _load(folder: str, identity: str, device: str) -> HMoEModel:
    # On CPUs the workers of a machine share the pages of the file.
    return HMoEModel.from_pretrained(folder, experts="file" if device == "cpu" else "memory").to(device)


def stamps_of(folder: Path, names: Iterable[str]) -> tuple[tuple[int, int], ...]:
    """Size and time of files."""
    found = [(folder / name).stat() for name in names]
    return tuple((each.st_size, each.st_mtime_ns) for each in found)


def check_stamps(folder: Path, names: Iterable[str], stamps: tuple[tuple[int, int], ...]) -> None:
    """Raise PipelineError when the files are not those that had these stamps."""
    if stamps_of(folder, names) != stamps:
        raise PipelineError(
            f"{folder} has changed while it was used: start again, which begins anew with what is there"
        )
