"""Exported models as folders: `config.json` says what a model is, `model.safetensors` holds its weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hmoe_ds.model.card import model_card
from hmoe_ds.model.description import CARD, CONFIG, FAMILIAR, FORMAT_VERSION, WEIGHTS, Description, ModelFormatError
from hmoe_ds.model.tensor_file import replace_tensors

# Tensors whose name has this in it are of experts.
_EXPERTS = ".executor.experts."

Model = TypeVar("Model", bound=nn.Module)


def load_weights(build: Callable[[], Model], folder: Path, map_experts: bool) -> Model:
    """A model with the weights of `folder`, in evaluation mode; parameters and buffers have the dtypes of the file.

    Args:
        build: makes the model, its weights of no account.
        folder: made by `write_pretrained`; `read_description` comes first.
        map_experts: leave the experts in the file, which is mapped: the system reads what is used, and may forget it.

    Raises:
        ModelFormatError: the file is damaged, or its weights are not those of the model.
    """
    with torch.device("meta"):  # shapes without values: initialisation takes longer than loading
        model = build()
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            mapped = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - nothing is read yet
            _check_weights(folder, mapped, model.state_dict())
            weights = {
                name: value if map_experts and _EXPERTS in name else value.clone() for name, value in mapped.items()
            }
    except SafetensorError as error:
        raise ModelFormatError(f"{folder} holds a damaged model ({error}): export the checkpoint again") from error
    model.load_state_dict(weights, assign=True)
    return model.eval()


def _check_weights(folder: Path, weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise ModelFormatError unless they have the names, kinds and shapes that are expected."""
    for name in sorted(expected.keys() | weights.keys()):
        found, wanted = (_kind(state.get(name)) for state in (weights, expected))
        if found != wanted:
            raise ModelFormatError(
                f"{folder / WEIGHTS} and {folder / CONFIG} are of different models: {name} is {found} in one, {wanted} "
                "in the other; export the checkpoint again"
            )


def _kind(tensor: Tensor | None) -> str:
    if tensor is None:
        return "missing"
    return f"{'floating' if tensor.is_floating_point() else str(tensor.dtype)} {list(tensor.shape)}"


def write_pretrained(folder: str | Path, weights: Mapping[str, Tensor], description: Description) -> None:
    """Write an export from a full state dict, with a model card; the folder is made if need be."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # The description comes last: a folder that has one is complete.
    (folder / CONFIG).unlink(missing_ok=True)
    (folder / FAMILIAR).unlink(missing_ok=True)  # of the model that was there before
    replace_tensors(folder / WEIGHTS, weights)
    heads = description.heads
    content = {
        "format_version": FORMAT_VERSION,
        "model": dataclasses.asdict(description.model),
        "router": dataclasses.asdict(description.router),
        "molecule_heads": None if heads is None else heads._asdict(),
        "training": description.training,
    }
    (folder / CARD).write_text(model_card(*description, weights))
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n")
