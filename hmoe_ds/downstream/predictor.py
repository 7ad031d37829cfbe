"""A fine-tuned predictor as a folder: `predictor.json`, and the encoder and head of each member of the ensemble.

predictor.json     what it predicts, how it was fitted, how good it is
member0/           model.safetensors and config.json, an encoder as `hmoe export` makes them; head.safetensors
member1/           the same; with a frozen encoder only the head, as all members share the first one's encoder
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data_pipeline.durable import replace_text
from hmoe_ds.downstream.fitting import Fit
from hmoe_ds.downstream.inference import batches_of
from hmoe_ds.downstream.label_scale import LabelScale, scaled_back
from hmoe_ds.downstream.predictor_record import DESCRIPTION, FORMAT_VERSION, HEAD, PredictorError, read_predictor
from hmoe_ds.downstream.property_model import PropertyModel
from hmoe_ds.downstream.scores import Array, Task, without_nan
from hmoe_ds.model.description import Description
from hmoe_ds.model.hmoe import HMoEModel, weights_of
from hmoe_ds.model.pretrained import write_pretrained
from hmoe_ds.model.tensor_file import replace_tensors


class Prediction(NamedTuple):
    """Of n molecules: chances of class 1, or quantities.

    Attributes:
        mean_nT: over the ensemble.
        deviation_nT: standard deviation over the ensemble; NaN for one member, of which it says nothing.
    """

    mean_nT: Array
    deviation_nT: Array


class Member(NamedTuple):
    """One fit of the ensemble."""

    model: PropertyModel
    scale: LabelScale


class Predictor(NamedTuple):
    """An ensemble of fine-tuned models.

    Attributes:
        task: what the targets are.
        targets: names of what is predicted.
        standardize: whether it was fitted to molecules in their standard form.
        members: of the ensemble.
    """

    task: Task
    targets: list[str]
    standardize: bool
    members: list[Member]

    def to(self, device: torch.device | str) -> Predictor:
        """The same on `device`."""
        return self._replace(members=[Member(model.to(device), scale) for model, scale in self.members])

    @torch.no_grad()
    def predict(self, molecules: pa.RecordBatch) -> Prediction:
        """Of encoded molecules; what it says of one does not depend on the others."""
        outputs: list[list[Array]] = [[] for _ in self.members]
        for batch in batches_of(molecules):
            readouts: dict[int, Tensor] = {}  # of each encoder: with frozen ones, all members have the same
            for (model, scale), parts in zip(self.members, outputs, strict=True):
                encoder = model.encoder
                if id(encoder) not in readouts:
                    readouts[id(encoder)] = model.read_out(batch.to(encoder.encoder.norm.weight.device))
                output_BT = model.head(readouts[id(encoder)])
                parts.append(scaled_back(output_BT.double().cpu().numpy(), scale))
        none_T = np.empty((0, len(self.targets)))
        return combine(self.task, [np.concatenate([none_T, *parts]) for parts in outputs])


def combine(task: Task, outputs: Sequence[Array]) -> Prediction:
    """What the members of an ensemble say, as one."""
    each = np.stack(outputs)
    if task == "classification":
        each = torch.from_numpy(each).sigmoid().numpy()
    deviation_nT = each.std(axis=0) if len(outputs) > 1 else np.full(each.shape[1:], np.nan)
    return Prediction(each.mean(axis=0), deviation_nT)


def save_predictor(
    out: Path, fits: Sequence[Fit], description: dict[str, Any], training: dict[str, Any], frozen: bool
) -> None:
    """Write a folder that `load_predictor` reads; its description comes last.

    Args:
        out: the folder, which is there.
        fits: the members.
        description: `task`, `targets`, `standardize`, and whatever a reader may want to know.
        training: where the weights of the encoder come from.
        frozen: all members have the same encoder.
    """
    members = []
    for number, fit in enumerate(fits):
        folder = out / f"member{number}"
        folder.mkdir(exist_ok=True)
        encoder = "member0" if frozen else folder.name
        if encoder == folder.name:
            write_encoder(folder, fit.model.encoder, training)
        replace_tensors(folder / HEAD, fit.model.head.state_dict())
        members.append({"head": folder.name, "encoder": encoder, "scale": fit.scale._asdict()})
    content = {"format_version": FORMAT_VERSION, **description, "readout": fits[0].model.readout, "members": members}
    replace_text(out / DESCRIPTION, json.dumps(without_nan(content), indent=2) + "\n")


def write_encoder(folder: Path, model: HMoEModel, training: dict[str, Any]) -> None:
    """Export an encoder without the heads of its pretraining."""
    described = Description(model.config, model.router, None, training)
    write_pretrained(folder, weights_of(described, model.state_dict()), described)


def load_predictor(folder: str | Path) -> Predictor:
    """What `save_predictor` wrote.

    Raises:
        PredictorError: there is none, or one of another version, or a damaged one.
        ModelFormatError: an encoder is damaged.
    """
    folder = Path(folder)
    content = read_predictor(folder)
    targets, readout = len(content["targets"]), content["readout"]
    encoders: dict[str, HMoEModel] = {}
    members = []
    for each in content["members"]:
        if each["encoder"] not in encoders:
            encoders[each["encoder"]] = HMoEModel.from_pretrained(folder / each["encoder"])
        model = PropertyModel(encoders[each["encoder"]], targets, readout, dropout=0.0, seed=0)
        try:
            model.head.load_state_dict(load_file(folder / each["head"] / HEAD))
        except (OSError, SafetensorError, RuntimeError) as error:
            told = str(error).partition("\n")[0]
            raise PredictorError(f"{folder / each['head'] / HEAD} is damaged ({told}): fine-tune again") from error
        members.append(Member(model.eval(), LabelScale(**each["scale"])))
    return Predictor(content["task"], content["targets"], content["standardize"], members)
