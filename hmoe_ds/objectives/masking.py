"""Masked atom and bond prediction: which atoms and bonds are hidden, and how well they are predicted."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from hmoe_ds.data.batch import Masks, MolBatch
from hmoe_ds.data.hashing import uniform

_ATOM, _BOND = 1, 2


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


def masked_atom_loss(logits_HC: Tensor, batch: MolBatch, masks: Masks) -> Tensor:
    """Summed cross-entropy, in nats, of the elements of the H hidden atoms."""
    return F.cross_entropy(logits_HC.float(), batch.atom_features_N9[masks.atom_N, 0].long(), reduction="sum")


def masked_bond_loss(logits_HC: Tensor, batch: MolBatch, masks: Masks) -> Tensor:
    """Summed cross-entropy, in nats, of the types of the H hidden bonds."""
    return F.cross_entropy(logits_HC.float(), batch.bond_features_M3[masks.bond_M, 0].long(), reduction="sum")
