"""Molecule migration: after the scaffold gate, each molecule moves once, to the rank that holds its group's experts.

One scaffold-level choice serves all H-MoE layers, and experts lie group-major over the ranks of an expert-parallel
group. So with `router.form` hard the upper blocks of a molecule on its group's rank find their experts at home, and the
atoms need not be sent there and back in every layer. All ranks decide alike who goes where, from (atoms, bonds, group)
of all molecules, under a bound on the atoms of a rank; molecules for which there is no room go elsewhere or stay, and
their atoms are dispatched as ever. So nothing is approximate: losses and gradients are those without migration, but for
the order of summation.

Two exchanges: floats (states of atoms and the probabilities of their molecules' groups), reversed in the backward; and
bytes (features, bonds, masks, keys, targets), which have no gradient. States of bonds are computed anew.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from hmoe_ds.data.batch import Masks, MolBatch, MoleculeTargets, to_device
from hmoe_ds.moe.dispatch import count
from hmoe_ds.moe.exchange import Traffic, exchange_rows, join_columns, split_columns
from hmoe_ds.moe.forms import ScaffoldRouting

Ints = NDArray[np.int64]


def assign(home_B: Ints, wanted_B: Ints, atoms_B: Ints, ranks: int, budget: float) -> Ints:
    """The rank that each molecule goes to: the one it wants, unless too many atoms would be there; -> [B]

    From a rank that is too full molecules are turned away, the largest of those that come from elsewhere first, at last
    one that is just large enough: home while there is room, then to the rank with the fewest atoms.

    Args:
        home_B: rank of each molecule now.
        wanted_B: rank of its group.
        atoms_B: its atoms.
        ranks: ranks of the expert-parallel group.
        budget: bound on the atoms of a rank, over their mean. With molecules that are large beside it, it is exceeded.
    """
    rank_B = wanted_B.copy()
    load_R = np.bincount(rank_B, weights=atoms_B, minlength=ranks)
    limit = budget * load_R.sum() / ranks
    for full in np.argsort(-load_R, kind="stable"):
        if load_R[full] <= limit:
            continue
        here = np.flatnonzero(rank_B == full)
        here = here[np.lexsort((-atoms_B[here], home_B[here] == full))]
        turned = here[_too_many(atoms_B[here], home_B[here] == full, load_R[full] - limit)]
        stays = _fits(home_B[turned], atoms_B[turned], limit - load_R)
        rank_B[turned[stays]] = home_B[turned[stays]]
        load_R += np.bincount(home_B[turned[stays]], weights=atoms_B[turned[stays]], minlength=ranks)
        load_R[full] -= atoms_B[turned[stays]].sum()
        for molecule in turned[~stays]:
            other, atoms = int(load_R.argmin()), atoms_B[molecule]
            if load_R[other] + atoms < load_R[full]:
                rank_B[molecule] = other
                load_R[full] -= atoms
                load_R[other] += atoms
    return rank_B


def _too_many(atoms_B: Ints, is_home_B: NDArray[np.bool_], excess: float) -> Ints:
    """Places of the first of these molecules that together have the excess, with the smallest last one that will do.

    The molecules are sorted by size, the largest first, those from elsewhere before those that are at home. A step has
    few molecules on each rank, so that one of them more or less is a percent of its atoms.
    """
    sums_B = np.cumsum(atoms_B)
    last = int(np.searchsorted(sums_B, excess))
    missing = excess - (sums_B[last] - atoms_B[last])
    enough = np.flatnonzero((atoms_B[last:] >= missing) & (is_home_B[last:] == is_home_B[last]))
    return np.append(np.arange(last), last + enough[-1])


def _fits(home_B: Ints, atoms_B: Ints, room_R: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which molecules find room at home, if those before them have taken theirs."""
    order = np.argsort(home_B, kind="stable")
    taken = np.cumsum(atoms_B[order])
    first = np.flatnonzero(np.diff(home_B[order], prepend=-1))
    before = np.repeat(taken[first] - atoms_B[order[first]], np.diff(first, append=len(order)))
    fits = np.empty(len(order), np.bool_)
    fits[order] = taken - before <= room_R[home_B[order]]
    return fits


class Sizes(NamedTuple):
    """Molecules, atoms and bonds that go to, or come from, each of R ranks."""

    molecules_R: list[int]
    atoms_R: list[int]
    bonds_R: list[int]


class Moves(NamedTuple):
    """What one rank sends and receives.

    Attributes:
        order_B: this rank's molecules in the order of the ranks that they go to.
        sent: to each rank, itself among them.
        received: from each rank.
        received_atoms_B: atoms of each molecule that is here afterwards.
        received_bonds_B: its bonds.
    """

    order_B: Tensor
    sent: Sizes
    received: Sizes
    received_atoms_B: Tensor
    received_bonds_B: Tensor


class Migrated(NamedTuple):
    """Molecules where their experts are, with what the upper blocks and the losses need of them.

    Of `routing` the atom gates ask groups and probabilities; `u_BP` and `z_B` are still those of the molecules before.
    """

    batch: MolBatch
    masks: Masks
    h_ND: Tensor
    routing: ScaffoldRouting


class Migration:
    """Moves molecules among the ranks of an expert-parallel group.

    Args:
        group: its process group.
        groups: G.
        budget: as in `assign`.
        traffic: counts what leaves this rank.
    """

    def __init__(self, group: dist.ProcessGroup, groups: int, budget: float, traffic: Traffic) -> None:
        self._group, self._groups, self._budget, self._traffic = group, groups, budget, traffic
        self._rank, self._ranks = dist.get_rank(group), dist.get_world_size(group)

    def __call__(self, batch: MolBatch, masks: Masks, h_ND: Tensor, routing: ScaffoldRouting) -> Migrated:
        """Move the molecules of all ranks; all ranks of the group must take part."""
        bonds_B = count(batch.molecule_N[batch.edge_index_2M[0, ::2]], batch.num_molecules)
        moves = self._plan(batch.ptr_B.diff(), bonds_B, routing)
        order_N = _rows_of(batch.ptr_B, moves.order_B, batch.num_atoms)
        order_M = _rows_of(_starts(bonds_B), moves.order_B, batch.num_bonds)
        chosen_NC = routing.log_p_BG.gather(1, routing.groups_BC)[batch.molecule_N]
        h_ND, chosen_NC = exchange_rows(
            [h_ND[order_N], chosen_NC[order_N]], self._group, self._traffic, moves.sent.atoms_R, moves.received.atoms_R
        )
        tables = byte_columns(batch, masks, routing.groups_BC)
        orders = (moves.order_B, order_N, order_M)
        packed = [join_columns(columns)[order] for columns, order in zip(tables, orders, strict=True)]
        received = self._exchange_bytes(packed, moves)
        rows = [split_columns(rows, columns) for rows, columns in zip(received, tables, strict=True)]
        batch, masks, groups_BC = _untabled(moves, *rows)
        log_p_BC = chosen_NC[batch.ptr_B[:-1]]
        # Of the groups that were not chosen nothing is asked any more.
        log_p_BG = log_p_BC.new_zeros(len(groups_BC), self._groups).scatter(1, groups_BC, log_p_BC)
        moved = routing._replace(log_p_BG=log_p_BG, groups_BC=groups_BC, biased_BG=log_p_BG.detach())
        return Migrated(batch, masks, h_ND, moved)

    def _plan(self, atoms_B: Tensor, bonds_B: Tensor, routing: ScaffoldRouting) -> Moves:
        wanted_B = routing.groups_BC[:, 0] * self._ranks // self._groups
        (atoms, bonds, wanted), counts_R = self._gather(torch.stack([atoms_B, bonds_B, wanted_B], dim=1))
        home = np.repeat(np.arange(self._ranks), counts_R)
        rank = assign(home, wanted, atoms, self._ranks, self._budget)
        device = atoms_B.device
        mine, here = home == self._rank, np.flatnonzero(rank == self._rank)
        return Moves(
            order_B=to_device(torch.from_numpy(np.argsort(rank[mine], kind="stable")), device),
            sent=_sizes(rank[mine], atoms[mine], bonds[mine], self._ranks),
            received=_sizes(home[here], atoms[here], bonds[here], self._ranks),
            received_atoms_B=to_device(torch.from_numpy(atoms[here]), device),
            received_bonds_B=to_device(torch.from_numpy(bonds[here]), device),
        )

    def _gather(self, table_B3: Tensor) -> tuple[Ints, list[int]]:
        """The rows of all ranks, in their order, as columns [3, B], and how many each has; values below 2^16."""
        count = torch.tensor([len(table_B3)], device=table_B3.device)
        counts = [torch.empty_like(count) for _ in range(self._ranks)]
        with self._traffic.clock(count.device):
            dist.all_gather(counts, count, group=self._group)
        counts_R = torch.cat(counts).tolist()
        # Every rank gets the table of every other one: six bytes for a molecule, not 24. Backends know no uint16.
        packed = torch.zeros(max(counts_R), 6, dtype=torch.uint8, device=table_B3.device)
        packed[: len(table_B3)] = table_B3.to(torch.int16).view(torch.uint8)
        tables = [torch.empty_like(packed) for _ in counts_R]
        with self._traffic.clock(packed.device):
            dist.all_gather(tables, packed, group=self._group)
        self._traffic.count(1, [8 + packed.numel()] * self._ranks, self._rank)
        rows = torch.cat([table[:size] for table, size in zip(tables, counts_R, strict=True)]).cpu().numpy()
        return rows.view(np.uint16).T.astype(np.int64), counts_R

    def _exchange_bytes(self, packed: list[Tensor], moves: Moves) -> list[Tensor]:
        """Rows of molecules, atoms and bonds, sorted by rank -> the same, from all ranks, in their order."""
        widths = [rows.shape[1] for rows in packed]
        pieces = zip(*(rows.split(sizes) for rows, sizes in zip(packed, moves.sent, strict=True)), strict=True)
        sent = torch.cat([piece.reshape(-1) for of_rank in pieces for piece in of_rank])
        sent_R, received_R = (
            [
                sum(width * size for width, size in zip(widths, of_rank, strict=True))
                for of_rank in zip(*sizes, strict=True)
            ]
            for sizes in (moves.sent, moves.received)
        )
        self._traffic.count(1, sent_R, self._rank)
        received = sent.new_empty(sum(received_R))
        with self._traffic.clock(sent.device):
            dist.all_to_all_single(received, sent, received_R, sent_R, group=self._group)
        lengths = [w * n for of_rank in zip(*moves.received, strict=True) for w, n in zip(widths, of_rank, strict=True)]
        parts = received.split(lengths)
        return [torch.cat(parts[kind::3]).view(-1, width) for kind, width in enumerate(widths)]


def _sizes(rank_B: Ints, atoms_B: Ints, bonds_B: Ints, ranks: int) -> Sizes:
    weights = (None, atoms_B, bonds_B)
    return Sizes(*(np.bincount(rank_B, weight, ranks).astype(np.int64).tolist() for weight in weights))


def _starts(counts_B: Tensor) -> Tensor:
    return torch.cat([counts_B.new_zeros(1), counts_B.cumsum(0)])


def _rows_of(ptr_B: Tensor, order_B: Tensor, rows: int) -> Tensor:
    """The rows of packed molecules when these are put into another order."""
    counts_B = ptr_B.diff()[order_B]
    shift_B = ptr_B[:-1][order_B] - _starts(counts_B)[:-1]
    return shift_B.repeat_interleave(counts_B, output_size=rows) + torch.arange(rows, device=ptr_B.device)


def byte_columns(batch: MolBatch, masks: Masks, groups_BC: Tensor) -> list[list[Tensor]]:
    """What moves as bytes, as columns of molecules, of atoms and of bonds; `_untabled` puts it together again.

    All columns of one kind have a row for each of them; their dtypes differ.
    """
    bonds_2M = batch.edge_index_2M[:, ::2]
    local_M2 = (bonds_2M - batch.ptr_B[batch.molecule_N[bonds_2M[0]]]).t().int()
    keys = [batch.scaffold_key_B.unsqueeze(1), batch.generic_key_B.unsqueeze(1), batch.mol_key_B2]
    return [
        [groups_BC, *keys, *(batch.targets or ())],
        [batch.atom_features_N9, batch.scaffold_mask_N.unsqueeze(1), masks.atom_N.unsqueeze(1)],
        [local_M2, batch.bond_features_M3, masks.bond_M.unsqueeze(1)],
    ]


def _untabled(
    moves: Moves, molecules: list[Tensor], atoms: list[Tensor], bonds: list[Tensor]
) -> tuple[MolBatch, Masks, Tensor]:
    """The batch, what is hidden of it, the groups."""
    groups_BC, scaffold_key, generic_key, mol_key_B2, *targets = molecules
    atom_features_N9, scaffold_mask, atom_mask = atoms
    local_M2, bond_features_M3, bond_mask = bonds
    ptr_B = _starts(moves.received_atoms_B)
    number_B = torch.arange(len(groups_BC), device=ptr_B.device)
    start_M = ptr_B[:-1].repeat_interleave(moves.received_bonds_B, output_size=len(local_M2))
    begin_M, end_M = (local_M2 + start_M.unsqueeze(1)).t()
    batch = MolBatch(
        atom_features_N9=atom_features_N9,
        edge_index_2M=torch.stack([torch.stack([begin_M, end_M], 1), torch.stack([end_M, begin_M], 1)]).flatten(1),
        bond_features_M3=bond_features_M3,
        molecule_N=number_B.repeat_interleave(moves.received_atoms_B, output_size=len(atom_features_N9)),
        ptr_B=ptr_B,
        scaffold_mask_N=scaffold_mask.squeeze(1),
        scaffold_key_B=scaffold_key.squeeze(1),
        generic_key_B=generic_key.squeeze(1),
        mol_key_B2=mol_key_B2,
        targets=MoleculeTargets(*targets) if targets else None,
    )
    return batch, Masks(atom_mask.squeeze(1), bond_mask.squeeze(1)), groups_BC
