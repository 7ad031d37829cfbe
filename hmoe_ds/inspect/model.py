"""An exported model: what it is, what it was trained on and on which terms, how to use it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from data_pipeline.quantities import byte_size
from hmoe_ds.config import MoleculeHeads
from hmoe_ds.inspect.model_size import architecture, parameters, parameters_fact
from hmoe_ds.inspect.noted import read_notes
from hmoe_ds.inspect.report import Report, fact
from hmoe_ds.inspect.trained import trained_facts, validation_facts
from hmoe_ds.inspect.weights_header import Tensor, read_header
from hmoe_ds.model.description import CONFIG, WEIGHTS, Description, read_description
from hmoe_ds.model.size import moe_layers, readout_width

# Every model has it; its dtype is that of the parameters, its length the width.
_LAST_NORM = "encoder.norm.weight"
_ATOM_HEAD = "atom_head."
_MOLECULE_HEAD = re.compile(r"(fingerprint|descriptor)_head\.layers\.0\.weight")
_FIRST_EXPERT_MATRIX = ".experts.w1"


def inspect_model(path: Path, verify: bool) -> Report:
    """What there is to know of an exported model.

    Args:
        path: its folder.
        verify: asks for checksums, which an export has none of; the text says so.

    Raises:
        ModelFormatError: no exported model there, or one that this version cannot read.
        UsageError: what it notes of its training makes no sense.
    """
    described = read_description(path)
    notes = read_notes(described.training, path / CONFIG)
    header, problems = weights_of(path, described)
    figures: dict[str, Any] = {
        "path": str(path),
        "format_version": json.loads((path / CONFIG).read_text())["format_version"],
        "architecture": architecture(described.model, described.router),
        "parameters": parameters(described.model, described.router, described.heads),
        "bytes": (path / WEIGHTS).stat().st_size,
        "dtype": header[_LAST_NORM].dtype if _LAST_NORM in header else None,
        "heads": _heads(described),
        "readout": described.heads.readout if described.heads and described.heads.names else None,
        "trained": {**notes._asdict(), "sources": [source._asdict() for source in notes.sources]},
        "problems": problems,
        "embed": f"hmoe embed {shlex.quote(str(path))} molecules.csv --out embeddings.parquet",
        "finetune": f"hmoe finetune {shlex.quote(str(path))} table.csv --target COLUMN --task classification --out OUT",
    }
    whole = "; ".join(problems) or f"{WEIGHTS} is as long as its header says, and of the model in {CONFIG}"
    lines = [
        fact("model", f"{path}: exported, format version {figures['format_version']}"),
        fact("shape", figures["architecture"]),
        parameters_fact(figures["parameters"]),
        fact("weights", byte_size(figures["bytes"]), figures["dtype"] or "dtype not known"),
        fact("heads", ", ".join(figures["heads"]) or "none (an encoder alone)", _seen(figures["readout"])),
        *trained_facts(notes),
        *validation_facts(notes.validation, described.router.groups),
        fact("files", whole + ("; an export has no checksums to verify" if verify else "")),
        fact("to embed", figures["embed"]),
        fact("to finetune", figures["finetune"]),
    ]
    return Report("model", "\n".join(lines), figures, problems)


def weights_of(path: Path, described: Description) -> tuple[dict[str, Tensor], list[str]]:
    """The header of an export's weights, and in what it is not that of the model that is described.

    It is compared in width, experts, heads and readout; loading the model compares all tensors.
    """
    try:
        header = read_header(path / WEIGHTS)
    except SafetensorError as error:
        return {}, [f"{path / WEIGHTS} is damaged ({error}): export the checkpoint again"]
    layers = [tensor for name, tensor in header.items() if name.endswith(_FIRST_EXPERT_MATRIX)]
    found = {
        "width": header[_LAST_NORM].shape if _LAST_NORM in header else None,
        "experts of each layer": [tensor.shape[:1] for tensor in layers],
        "heads": any(name.startswith(_ATOM_HEAD) for name in header),
        "readouts of molecules": [
            tensor.shape[1:] for name, tensor in header.items() if _MOLECULE_HEAD.fullmatch(name)
        ],
    }
    heads, width = described.heads or MoleculeHeads(), described.model.hidden_size
    expected = {
        "width": [width],
        "experts of each layer": [[described.router.experts]] * moe_layers(described.model),
        "heads": described.heads is not None,
        "readouts of molecules": [[readout_width(heads.readout, width)] for _ in heads.names],
    }
    return header, [
        f"{path / WEIGHTS} and {path / CONFIG} are of different models: {name} {found[name]} in one, {value} in the "
        "other; export the checkpoint again"
        for name, value in expected.items()
        if found[name] != value
    ]


def _seen(readout: str | None) -> str:
    return f"those of molecules see {readout}" if readout else ""


def _heads(described: Description) -> list[str]:
    """Names of the pretraining heads."""
    if described.heads is None:
        return []
    return ["atoms", "bonds", *described.heads.names]
