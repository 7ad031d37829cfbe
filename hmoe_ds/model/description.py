"""What an exported model is: its `config.json`. Imports no torch: to look at a model is quick."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

from data_pipeline.errors import UsageError
from hmoe_ds.config import ConfigError, ModelConfig, MoleculeHeads, Readout, RouterConfig, RunConfig, section_from_dict
from hmoe_ds.config_checks import check_config

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
# Only where the novelty of molecules can be told (`familiar.py`).
FAMILIAR = "familiar.safetensors"
FILES = (CARD, CONFIG, WEIGHTS, FAMILIAR)
# 1: always with the heads of masked atoms and bonds. 2: `molecule_heads` null, and none of them, for an encoder alone.
FORMAT_VERSION = 2
_READABLE = (1, 2)


class ModelFormatError(UsageError):
    """A folder that is no exported model, or one that this version cannot read."""


class Description(NamedTuple):
    """What `config.json` says of a model.

    Attributes:
        model: sizes of the encoder.
        router: gate and experts.
        heads: of molecule-level objectives; None for an encoder without any pretraining heads.
        training: where the weights come from.
    """

    model: ModelConfig
    router: RouterConfig
    heads: MoleculeHeads | None
    training: dict[str, Any]

    @property
    def standardize(self) -> bool:
        """Whether the model was trained on molecules in their standard form; so it was where that is not noted."""
        return self.training.get("standardize", True) is not False


def read_description(folder: Path) -> Description:
    """What is in a folder that `write_pretrained` made.

    Raises:
        ModelFormatError: no exported model there, or one of another format version, or one that cannot be.
    """
    path = folder / CONFIG
    if not path.is_file() or not (folder / WEIGHTS).is_file():
        raise ModelFormatError(
            f"{folder} is no exported model: expected {CONFIG} and {WEIGHTS} in it; `hmoe export` makes them"
        )
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ModelFormatError(f"{folder} holds a damaged model ({error}): export the checkpoint again") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version not in _READABLE:
        raise ModelFormatError(
            f"{path} has format_version {version!r}: this version of hmoe_ds reads {_READABLE[0]} to {_READABLE[-1]}; "
            "export the checkpoint again"
        )
    try:
        model, router = (section_from_dict(name, content.get(name)) for name in ("model", "router"))
        check_config(RunConfig(model=model, router=router))
    except ConfigError as error:
        raise ModelFormatError(f"{path}: {error}") from error
    training = content.get("training")
    return Description(model, router, _read_heads(path, content), training if isinstance(training, dict) else {})


def _read_heads(path: Path, content: Mapping[str, Any]) -> MoleculeHeads | None:
    # Models exported before there were heads of molecules have none.
    heads = content.get("molecule_heads", {})
    if heads is None and content["format_version"] > 1:
        return None
    known = isinstance(heads, dict) and heads.keys() <= set(MoleculeHeads._fields)
    if not known or heads.get("readout", "mean") not in get_args(Readout):
        raise ModelFormatError(f"{path} has molecule_heads {heads!r}: use the version of hmoe_ds that wrote it")
    return MoleculeHeads(**heads)
