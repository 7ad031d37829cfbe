"""Noting down beside an exported model which scaffolds it was pretrained on, for its novelty score."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.errors import UsageError
from data_pipeline.manifest import is_dataset
from hmoe_ds.data.batch import gather
from hmoe_ds.data.store import ShardStore
from hmoe_ds.downstream.inference import inference_device
from hmoe_ds.model.familiar import NEIGHBOURS, Familiar, write_familiar
from hmoe_ds.model.hmoe import HMoEModel

MOLECULES = 8192
# Molecules with one scaffold lie beside each other in a shard, in runs of up to 16.
_SPREAD = 16
_AT_ONCE = 256


def familiarize(folder: str | Path, dataset: str | Path) -> int:
    """Compute what the model in `folder` is familiar with from molecules of `dataset`; -> how many.

    Args:
        folder: of an exported model.
        dataset: that it was trained on, or one like it: its training split, or the first part of it.

    Raises:
        PipelineError: no dataset there.
        UsageError: one that has hardly any molecules.
    """
    store = ShardStore(dataset, "train")
    available = min(len(store), _SPREAD * MOLECULES)
    if available <= NEIGHBOURS:
        raise UsageError(f"{dataset} has {available} molecules to train on: give a dataset with more than {NEIGHBOURS}")
    rows = np.linspace(0, available - 1, min(MOLECULES, available)).astype(np.int64)
    model = HMoEModel.from_pretrained(folder).to(inference_device())
    readouts = []
    with torch.inference_mode():
        for part in np.array_split(rows, -(-len(rows) // _AT_ONCE)):
            readouts.append(model.encoder.route(gather(store, part).to(inference_device())).readout_BD.float())
        write_familiar(Path(folder), Familiar.of(torch.cat(readouts)))
    return len(rows)


def dataset_of(training: Mapping[str, Any]) -> str | None:
    """The first dataset of the run that made an export, if it is on this machine."""
    path = training.get("config", {}).get("data", {}).get("path")
    first = path[0] if isinstance(path, list) and path else path
    return first if isinstance(first, str) and "://" not in first and is_dataset(Path(first)) else None
