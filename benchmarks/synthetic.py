"""Molecules that are none, for benchmarks of speed where no dataset is at hand: chains of common atoms with rings."""

from __future__ import annotations

import numpy as np
import torch

from hmoe_ds.data.batch import MolBatch
from hmoe_ds.data.hashing import hash64
from hmoe_ds.objectives.masking import draw_masks, hidden_rows
from hmoe_ds.objectives.total import RankSlice

# Features of common atoms and bonds, as indices: aromatic CH and C, CH2, CH3, O, N; aromatic, single, double.
_ATOMS = torch.tensor(
    [
        (5, 0, 3, 5, 1, 0, 1, 1, 1),
        (5, 0, 3, 5, 0, 0, 1, 1, 1),
        (5, 0, 4, 5, 2, 0, 2, 0, 1),
        (5, 0, 4, 5, 3, 0, 2, 0, 0),
        (7, 0, 1, 5, 0, 0, 1, 0, 0),
        (6, 0, 3, 5, 1, 0, 1, 0, 0),
    ],
    dtype=torch.uint8,
)
_BONDS = torch.tensor([(3, 0, 1), (0, 0, 0), (1, 0, 1)], dtype=torch.uint8)
# Molecules of one scaffold, so that the contrastive loss has positives.
_FAMILY = 4


def synthetic_slice(molecules: int, atoms: int, rings: int, mask_ratio: float, seed: int) -> RankSlice:
    """A slice of one rank, on the CPU: `molecules` chains of `atoms` atoms, each with `rings` bonds besides.

    Args:
        molecules: B, at least 1.
        atoms: of a molecule, at least 3 more than `rings`.
        rings: bonds that close a ring of three atoms.
        mask_ratio: share of hidden atoms and bonds.
        seed: of features, keys and masks.
    """
    generator = torch.Generator().manual_seed(seed)
    begin_M = torch.cat([torch.arange(atoms - 1), torch.arange(rings)])
    end_M = torch.cat([torch.arange(1, atoms), torch.arange(rings) + 2])
    edges_2M = torch.stack([torch.stack([begin_M, end_M], 1), torch.stack([end_M, begin_M], 1)]).flatten(1)
    first_B = atoms * torch.arange(molecules)
    number_B = np.arange(molecules, dtype=np.uint64)
    family_B = torch.from_numpy(hash64(seed, 1, number_B // _FAMILY).view(np.int64))
    key_B2 = torch.from_numpy(np.stack([hash64(seed, kind, number_B) for kind in (2, 3)], axis=1).view(np.int64))
    batch = MolBatch(
        atom_features_N9=_draw(_ATOMS, molecules * atoms, generator),
        edge_index_2M=(edges_2M.unsqueeze(1) + first_B.view(1, -1, 1)).flatten(1),
        bond_features_M3=_draw(_BONDS, molecules * (atoms - 1 + rings), generator),
        molecule_N=torch.arange(molecules).repeat_interleave(atoms),
        ptr_B=atoms * torch.arange(molecules + 1),
        scaffold_mask_N=torch.arange(molecules * atoms) % atoms < rings + 2,
        scaffold_key_B=family_B,
        generic_key_B=family_B,
        mol_key_B2=key_B2,
    )
    masks = draw_masks(batch, np.zeros(molecules, np.int64), mask_ratio, seed)
    return RankSlice(
        batch, masks, hidden_rows(masks), counts=[molecules], rank=0, scaffold_key_B=family_B, generic_key_B=family_B
    )


def _draw(table: torch.Tensor, rows: int, generator: torch.Generator) -> torch.Tensor:
    return table[torch.randint(len(table), (rows,), generator=generator)]
