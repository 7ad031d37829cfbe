"""The peer of `peer_step`: attribute masking with a GIN, written from its published description.

Hu et al., "Strategies for Pre-training Graph Neural Networks", 2020: 5 GIN layers of width 300 with embeddings of atom
type and chirality, of bond type and direction; a message is the neighbour's state plus the bond's embedding, self-loops
have a bond type of their own; an MLP 300-600-300, batch normalisation and ReLU (none after the last layer). 15% of the
atoms get a mask type, a linear layer predicts their types; Adam, batches of 256, no dropout in pretraining.

Atoms and bonds have their Open Graph Benchmark features: its bond stereo stands for the direction of the recipe.
"""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.data import Batch, Data
from torch_geometric.nn import MessagePassing
from torch_geometric.utils import add_self_loops

from data_pipeline.schema import ATOM_FEATURE_SIZES, BOND_FEATURE_SIZES

ATOM_TYPES, CHIRALITIES = ATOM_FEATURE_SIZES[:2]
BOND_TYPES, DIRECTIONS = BOND_FEATURE_SIZES[:2]
MASK_TYPE, LOOP_TYPE = ATOM_TYPES, BOND_TYPES


class MaskAtom:
    """Hides 15% of a molecule's atoms, at least one; the transform of a dataset of `Data`."""

    def __init__(self, ratio: float = 0.15) -> None:
        self._ratio = ratio

    def __call__(self, molecule: Data) -> Data:
        atoms = molecule.num_nodes
        hidden_H = torch.tensor(random.sample(range(atoms), int(atoms * self._ratio + 1)))
        x = molecule.x.clone()
        x[hidden_H] = torch.tensor([MASK_TYPE, 0])
        return MaskedData(
            x=x,
            edge_index=molecule.edge_index,
            edge_attr=molecule.edge_attr,
            masked_index=hidden_H,
            masked_type=molecule.x[hidden_H, 0],
        )


class MaskedData(Data):
    """A molecule with hidden atoms, whose indices move with the atoms' when molecules are put together."""

    def __inc__(self, key: str, value: object, *others: object) -> int:
        return int(self.num_nodes) if key == "masked_index" else super().__inc__(key, value, *others)


class GINLayer(MessagePassing):
    """Sum of neighbours' states and bonds' embeddings, then an MLP.

    Args:
        width: of the states.
    """

    def __init__(self, width: int) -> None:
        super().__init__(aggr="add")
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
        self.bond_type = nn.Embedding(BOND_TYPES + 1, width)
        self.direction = nn.Embedding(DIRECTIONS, width)

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor) -> Tensor:
        edge_index, _ = add_self_loops(edge_index, num_nodes=x.shape[0])
        loops = edge_attr.new_zeros(x.shape[0], 2)
        loops[:, 0] = LOOP_TYPE
        edge_attr = torch.cat([edge_attr, loops])
        bonds = self.bond_type(edge_attr[:, 0]) + self.direction(edge_attr[:, 1])
        return self.mlp(self.propagate(edge_index, x=x, bonds=bonds))

    def message(self, x_j: Tensor, bonds: Tensor) -> Tensor:
        return x_j + bonds


class GIN(nn.Module):
    """The encoder and the head of hidden atoms.

    Args:
        width: of the states.
        layers: of message passing.
    """

    def __init__(self, width: int = 300, layers: int = 5) -> None:
        super().__init__()
        self.atom_type = nn.Embedding(ATOM_TYPES + 1, width)
        self.chirality = nn.Embedding(CHIRALITIES, width)
        self.layers = nn.ModuleList([GINLayer(width) for _ in range(layers)])
        self.norms = nn.ModuleList([nn.BatchNorm1d(width) for _ in range(layers)])
        self.head = nn.Linear(width, ATOM_TYPES)

    def forward(self, batch: Batch) -> Tensor:
        """The loss: mean cross-entropy of the hidden atoms' types."""
        h = self.atom_type(batch.x[:, 0]) + self.chirality(batch.x[:, 1])
        for number, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True), start=1):
            h = norm(layer(h, batch.edge_index, batch.edge_attr))
            h = h if number == len(self.layers) else F.relu(h)
        return F.cross_entropy(self.head(h[batch.masked_index]), batch.masked_type)


def peer_molecule(molecule: Data) -> Data:
    """An Open Graph Benchmark graph with the features that the peer has."""
    return Data(
        x=molecule.x[:, :2].contiguous(),
        edge_index=molecule.edge_index,
        edge_attr=molecule.edge_attr[:, :2].contiguous(),
    )
