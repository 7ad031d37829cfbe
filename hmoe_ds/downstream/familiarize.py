"""Noting down beside an exported model which scaffolds it was pretrained on, for its novelty score."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.errors import PipelineError, UsageError
from data_pipeline.remote import is_url
from hmoe_ds.data.batch import gather
from hmoe_ds.data.mixture import Mixture
from hmoe_ds.data.spread import spread_rows
from hmoe_ds.data.store import ShardStore
from hmoe_ds.downstream.inference import inference_device
from hmoe_ds.model.familiar import NEIGHBOURS, Familiar, write_familiar
from hmoe_ds.model.hmoe import HMoEModel

MOLECULES = 8192
_AT_ONCE = 256


def familiarize(folder: str | Path, mixture: Mixture) -> int:
    """Compute what the model in `folder` is familiar with; -> from how many molecules.

    Args:
        folder: of an exported model.
        mixture: what it was trained on, or what is like it; training splits.

    Raises:
        UsageError: hardly any molecules there.
        PipelineError: their scaffolds do not differ.
    """
    rows = _rows(mixture)
    if len(rows) <= NEIGHBOURS:
        raise UsageError(f"{len(rows)} molecules to train on are too few to tell what is novel beside them")
    model = HMoEModel.from_pretrained(folder).to(inference_device())
    readouts = []
    with torch.inference_mode():
        for part in np.array_split(rows, -(-len(rows) // _AT_ONCE)):
            readouts.append(model.encoder.route(gather(mixture, part).to(inference_device())).readout_BD.float())
        write_familiar(Path(folder), Familiar.of(torch.cat(readouts)))
    return len(rows)


def _rows(mixture: Mixture) -> NDArray[np.int64]:
    """Rows of each dataset by its weight, evenly spread over its beginning."""
    stores = zip(mixture.stores, mixture.first_row_S, mixture.weight_S, strict=True)
    return np.concatenate(
        [first + spread_rows(len(store), round(MOLECULES * weight)) for store, first, weight in stores]
    )


def datasets_of_run(training: Mapping[str, Any]) -> Mixture:
    """What a model was trained on, if it is on this machine and still the same.

    Args:
        training: as its export notes it (`Description.training`).

    Raises:
        PipelineError: it is not.
    """
    data = training.get("config", {}).get("data", {})
    path = data.get("path")
    paths = path if isinstance(path, list) else [path]
    if not all(isinstance(one, str) and one for one in paths):
        raise PipelineError("the export does not say what the model was trained on")
    elsewhere = [one for one in paths if is_url(one)]
    if elsewhere:
        raise PipelineError(f"{elsewhere[0]} is not on this machine")
    mixture = Mixture([ShardStore(one, "train") for one in paths], data.get("weights"))
    if mixture.fingerprint != training.get("dataset"):
        raise PipelineError(f"{', '.join(paths)} has other molecules than those that the model was trained on")
    return mixture
