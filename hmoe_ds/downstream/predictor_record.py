"""What a fine-tuned predictor is: its `predictor.json`. Imports no torch: to look at a predictor is quick."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import numpy as np

from data_pipeline.errors import UsageError
from hmoe_ds.config import Readout
from hmoe_ds.downstream.label_scale import LabelScale

FORMAT_VERSION = 2  # 1 had no `readout`: it was the mean
DESCRIPTION, HEAD = "predictor.json", "head.safetensors"
_MEMBER = re.compile(r"member\d+")


class PredictorError(UsageError):
    """A folder that holds no fine-tuned predictor, or one that this version cannot read."""


def read_predictor(folder: Path) -> dict[str, Any]:
    """The description of a predictor, as one of the present version.

    Raises:
        PredictorError: there is none, or one of another version.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        raise PredictorError(f"{folder} holds no {DESCRIPTION}: give a folder that `hmoe finetune` made")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise PredictorError(f"{path} is damaged ({error}): fine-tune again") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version not in (1, FORMAT_VERSION):
        raise PredictorError(
            f"{path} has format_version {version!r}: this version of hmoe_ds reads 1 and {FORMAT_VERSION}"
        )
    if version == 1:
        content["readout"] = "mean"
    try:
        members = [(each["head"], each["encoder"], LabelScale(**each["scale"])) for each in content["members"]]
        targets, names = content["targets"], [name for head, encoder, _ in members for name in (head, encoder)]
        if not (isinstance(targets, list) and targets and all(isinstance(name, str) for name in targets)):
            raise ValueError(f"targets {targets!r}")
        if not members or not all(_MEMBER.fullmatch(name) for name in names):
            raise ValueError(f"members {names}")
        if content["task"] not in ("classification", "regression") or not isinstance(content["standardize"], bool):
            raise ValueError(f"task {content['task']!r}, standardize {content['standardize']!r}")
        if content["readout"] not in get_args(Readout):
            raise ValueError(f"readout {content['readout']!r}")
        for _, _, scale in members:
            numbers = np.array([*scale], dtype=np.float64)
            if numbers.shape != (2, len(targets)) or not np.isfinite(numbers).all() or (numbers[1] <= 0).any():
                raise ValueError(f"scale {scale}")
    except (KeyError, TypeError, ValueError) as error:
        raise PredictorError(f"{path} is damaged ({error!r}): fine-tune again") from error
    return content
