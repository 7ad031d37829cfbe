"""Masked atom and bond prediction: which atoms and bonds are hidden, and how well they are predicted."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from hmoe_ds.data.batch import Masks, MolBatch
from hmoe_ds.data.hashing import uniform
from hmoe_ds.moe.wide import wide

_ATOM, _BOND = 1, 2


class Hidden(NamedTuple):
    """Which atoms and which bonds are hidden, as their rows, ascending.

    Rows are taken by number without waiting for a GPU; by a mask they are not, as it must say how many they are.
    """

    atom_H: Tensor
    bond_H: Tensor


def hidden_rows(masks: Masks) -> Hidden:
    """The rows that are hidden; on a GPU the host waits for it."""
    return Hidden(*(mask.nonzero().squeeze(1) for mask in masks))


def draw_masks(batch: MolBatch, epoch_B: NDArray[np.int64], ratio: float, seed: int) -> Masks:
    """Hide each atom and each bond with probability `ratio`, as a pure function of (molecule, epoch, seed).

    Args:
        batch: B molecules, on the CPU.
        epoch_B: epoch of each molecule, in which it is dealt once.
        ratio: expected share of hidden atoms and bonds.
        seed: of the run.
    """
    key_B2 = batch.mol_key_B2.numpy().view(np.uint64)
    molecule_N = batch.molecule_N.numpy()
    molecule_M = molecule_N[batch.edge_index_2M[0, ::2].numpy()]
    hidden = []
    for kind, molecule_R in ((_ATOM, molecule_N), (_BOND, molecule_M)):
        first_B = np.searchsorted(molecule_R, np.arange(len(key_B2)))
        position_R = np.arange(len(molecule_R)) - first_B[molecule_R]
        key_R2, epoch_R = key_B2[molecule_R], epoch_B[molecule_R]
        draw_R = uniform(seed, kind, key_R2[:, 0], key_R2[:, 1], epoch_R, position_R)
        hidden.append(torch.from_numpy(draw_R < ratio))
    return Masks(*hidden)


def hidden_states(h_ND: Tensor, batch: MolBatch, hidden: Hidden) -> tuple[Tensor, Tensor, Tensor]:
    """States of the hidden atoms and of both ends of the hidden bonds, each [H, D]."""
    ends_2H = batch.edge_index_2M[:, ::2].index_select(1, hidden.bond_H)
    begin_HD, end_HD = h_ND.index_select(0, ends_2H.flatten()).chunk(2)
    return h_ND.index_select(0, hidden.atom_H), begin_HD, end_HD


def masked_atom_loss(logits_HC: Tensor, batch: MolBatch, hidden: Hidden) -> Tensor:
    """Summed cross-entropy, in nats, of the elements of the H hidden atoms."""
    element_H = batch.atom_features_N9[:, 0].index_select(0, hidden.atom_H)
    return F.cross_entropy(wide(logits_HC), element_H.long(), reduction="sum")


def masked_bond_loss(logits_HC: Tensor, batch: MolBatch, hidden: Hidden) -> Tensor:
    """Summed cross-entropy, in nats, of the types of the H hidden bonds."""
    type_H = batch.bond_features_M3[:, 0].index_select(0, hidden.bond_H)
    return F.cross_entropy(wide(logits_HC), type_H.long(), reduction="sum")
