"""An exported model in worker processes: each loads it once, and then it serves all tasks of that process."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

import hmoe_ds
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
        hidden_size: width D of its embeddings.
        layers: with experts.
        standardize: whether it was trained on molecules in their standard form.
    """

    folder: str
    weights: str
    identity: str
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
        return cls(str(folder), weights, identity, *sizes, standardize)

    def loaded(self) -> tuple[HMoEModel, str]:
        """The model in this process, and the device on which it lies. A worker is one core."""
        torch.set_num_threads(1)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return _load(self.folder, self.identity, device), device


@cache
def _load(folder: str, identity: str, device: str) -> HMoEModel:
    # The workers of a machine share the pages of the file.
    return HMoEModel.from_pretrained(folder, experts="file").to(device)
