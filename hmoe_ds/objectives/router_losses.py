"""Losses on the gates themselves."""

from __future__ import annotations

from torch import Tensor

from hmoe_ds.model.encoder import Encoding


def router_z_loss(encoding: Encoding, molecules: float, atoms: float) -> Tensor:
    """Mean squared log-partition of the logits of both gates, which keeps them from growing.

    Source: Zoph et al., "ST-MoE", 2022, equation 5.

    Args:
        encoding: this rank's molecules.
        molecules: molecules to average the scaffold level over.
        atoms: atoms to average the atom level over; layers are averaged too.
    """
    atom_z = sum(routing.z_N.sum() for routing in encoding.atoms) / len(encoding.atoms)
    return encoding.scaffold.z_B.sum() / molecules + atom_z / atoms
