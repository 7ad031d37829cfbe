"""What a replay of traffic (`moe/replay.py`) needs to know of a forward."""

from __future__ import annotations

import numpy as np
import torch

from hmoe_ds.data.batch import Masks, MolBatch
from hmoe_ds.model.encoder import Encoding
from hmoe_ds.moe.migration import byte_columns
from hmoe_ds.moe.replay import Routing, RowBytes


def routing_of(batch: MolBatch, encoding: Encoding) -> Routing:
    """Where these molecules were routed, for `moe/replay.py`."""
    bond_molecule_M = batch.molecule_N[batch.edge_index_2M[0, ::2]]
    columns = (
        batch.ptr_B.diff(),
        torch.bincount(bond_molecule_M, minlength=batch.num_molecules),
        batch.scaffold_key_B,
        encoding.scaffold.groups_BC,
        torch.stack([atoms.choices_NK for atoms in encoding.atoms]),
    )
    return Routing(*(column.cpu().numpy().astype(np.int64, copy=False) for column in columns))


def row_bytes(batch: MolBatch, masks: Masks, encoding: Encoding) -> RowBytes:
    """Widths of the rows that a rank with these molecules sends."""
    scaffold = encoding.scaffold
    shares = scaffold.groups_BC.shape[1] * scaffold.log_p_BG.element_size()
    columns = byte_columns(batch, masks, scaffold.groups_BC)
    widths = [sum(column.shape[1] * column.element_size() for column in of_kind) for of_kind in columns]
    return RowBytes(encoding.h_ND.shape[1] * encoding.h_ND.element_size(), shares, *widths)
