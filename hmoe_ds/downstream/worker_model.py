"""An exported model in worker processes: each loads it once, and then it serves all tasks of that process."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from hmoe_ds.downstream.inference import inference_device
from hmoe_ds.downstream.worker_files import WorkerFiles
from hmoe_ds.model.description import CONFIG, FAMILIAR, WEIGHTS, read_description
from hmoe_ds.model.hmoe import HMoEModel
from hmoe_ds.model.hub import find_model
from hmoe_ds.model.size import moe_layers


@dataclass(frozen=True)
class WorkerModel:
    """Where a model lies, and what it is.

    Args:
        files: of the exported model.
        hidden_size: width D of its embeddings.
        layers: with experts.
        standardize: whether it was trained on molecules in their standard form.
    """

    files: WorkerFiles
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
        names = (CONFIG, WEIGHTS, *([FAMILIAR] if (folder / FAMILIAR).is_file() else ()))
        files = WorkerFiles.of(folder, names)
        return cls(files, described.model.hidden_size, moe_layers(described.model), described.standardize)

    def loaded(self) -> tuple[HMoEModel, str]:
        """The model in this process, and the device on which it lies. A worker is one core.

        Raises:
            PipelineError: its files have changed since they were looked at.
        """
        torch.set_num_threads(1)
        device = inference_device()
        model = _load(self.files.folder, self.files.identity, device)
        self.files.check()
        return model, device


@cache
def _load(folder: str, identity: str, device: str) -> HMoEModel:
    # On CPUs the workers of a machine share the pages of the file.
    return HMoEModel.from_pretrained(folder, experts="file" if device == "cpu" else "memory").to(device)
