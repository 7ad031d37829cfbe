"""A pretrained encoder with a head that predicts properties of molecules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hmoe_ds.config import Readout
from hmoe_ds.data.batch import MolBatch
from hmoe_ds.model.hmoe import HMoEModel
from hmoe_ds.model.readout import read_out
from hmoe_ds.model.size import readout_width


class PropertyHead(nn.Sequential):
    """Readouts of molecules to T numbers: logits of classes, or quantities on the scale of the fit; [B, W] -> [B, T].

    Args:
        width: W, of the readout.
        hidden_size: width of its hidden layer.
        targets: T.
        dropout: share of the inputs of each layer that are dropped in training.
    """

    def __init__(self, width: int, hidden_size: int, targets: int, dropout: float) -> None:
        super().__init__(
            nn.Dropout(dropout),
            nn.Linear(width, hidden_size),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden_size, targets),
        )
        self.targets = targets


class PropertyModel(nn.Module):
    """Predicts T properties of molecules, in fp32: in half precision, small steps of a fit would be lost.

    Args:
        encoder: pretrained, or not; it is converted.
        targets: T.
        readout: what the head sees of a molecule.
        dropout: of the head.
        seed: of the head's initialisation.
    """

    def __init__(self, encoder: HMoEModel, targets: int, readout: Readout, dropout: float, seed: int) -> None:
        super().__init__()
        self.encoder, self.readout = encoder.float(), readout
        width = encoder.config.hidden_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = PropertyHead(readout_width(readout, width), width, targets, dropout)

    def forward(self, batch: MolBatch) -> Tensor:
        """B molecules -> [B, T]"""
        return self.head(self.read_out(batch))

    def read_out(self, batch: MolBatch) -> Tensor:
        """What the head sees of B molecules; -> [B, W]"""
        return read_out(self.readout, self.encoder(batch).h_ND, batch)


def parameter_groups(model: PropertyModel, learning_rate: float, layer_decay: float) -> list[dict[str, Any]]:
    """For an optimizer: the learning rate of the head, times `layer_decay` for each layer further down.

    Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification", 2018. Layers are the blocks; the
    scaffold gate belongs to the last lower one, and the embeddings lie below all.
    """
    encoder = model.encoder.encoder
    lower, upper = list(encoder.lower), list(encoder.upper)
    below: list[list[nn.Module]] = [[encoder.atom_embedding, encoder.bond_embedding]]
    below += [[block] for block in lower]
    below[-1].append(encoder.scaffold_gate)
    below += [[block] for block in upper]
    below[-1].append(encoder.norm)
    layers: list[list[nn.Module]] = [*below, [model.head]]
    groups: list[dict[str, Any]] = []
    for depth, modules in enumerate(reversed(layers)):
        parameters = [parameter for module in modules for parameter in module.parameters()]
        groups.append({"params": parameters, "lr": learning_rate * layer_decay**depth})
    return groups
