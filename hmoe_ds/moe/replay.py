"""Bytes that any number of ranks would send each other for experts, from routing that was recorded on one.

The ranks share all experts (`ep_size` of them), and activations are kept, not recomputed. Who goes where is decided by
the code of a real run, `dealt_order` and `assign`; rows are as wide as they are there. A test holds the sums, to the
byte, to what real ranks count. In a matrix of bytes, entry (s, r) is what rank s sends to rank r in the forward and
backward of a slice; its diagonal is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hmoe_ds.config import RouterConfig
from hmoe_ds.data.plan import dealt_order
from hmoe_ds.moe.migration import assign

Ints = NDArray[np.int64]


class Routing(NamedTuple):
    """Where a slice's B molecules and N atoms were routed, in the plan's order.

    Attributes:
        atoms_B: atoms of each molecule.
        bonds_B: its bonds.
        scaffold_B: key of its scaffold; 0 = acyclic.
        groups_BC: its groups, the top choice first.
        experts_LNK: experts of each atom in each of L layers; as many as there are experts = a choice that is unused.
    """

    atoms_B: Ints
    bonds_B: Ints
    scaffold_B: Ints
    groups_BC: Ints
    experts_LNK: Ints


def joined(pieces: Sequence[Routing]) -> Routing:
    """Several, one after the other, as one."""
    *of_molecules, experts = zip(*pieces, strict=True)
    atoms_B, bonds_B, scaffold_B, groups_BC = map(np.concatenate, of_molecules)
    return Routing(atoms_B, bonds_B, scaffold_B, groups_BC, np.concatenate(experts, axis=1))


def sliced(routing: Routing, molecules: int) -> list[Routing]:
    """Pieces of so many molecules; what is left in the end is left out."""
    ends_B = np.concatenate([[0], np.cumsum(routing.atoms_B)])
    pieces = []
    for first in range(0, len(routing.atoms_B) - molecules + 1, molecules):
        here, atoms = slice(first, first + molecules), slice(ends_B[first], ends_B[first + molecules])
        *of_molecules, experts = routing
        atoms_B, bonds_B, scaffold_B, groups_BC = (column[here] for column in of_molecules)
        pieces.append(Routing(atoms_B, bonds_B, scaffold_B, groups_BC, experts[:, atoms]))
    return pieces


class RowBytes(NamedTuple):
    """Bytes of what is sent.

    Attributes:
        state: an atom's state.
        shares: the probabilities of a molecule's groups, which each of its atoms takes along.
        molecule: what moves of a molecule without gradient.
        atom: of an atom.
        bond: of a bond.
    """

    state: int
    shares: int
    molecule: int
    atom: int
    bond: int


class Placement(NamedTuple):
    """On which rank each molecule is dealt, which one has its group's experts, and where its upper blocks are run."""

    home_B: Ints
    wanted_B: Ints
    rank_B: Ints


def place(routing: Routing, router: RouterConfig, ranks: int, budget: float | None) -> Placement:
    """Deal a slice to ranks, and migrate its molecules within `budget`; None for no migration."""
    order_B, counts_R = dealt_order(routing.atoms_B, ranks)
    home_B = np.empty_like(order_B)
    home_B[order_B] = np.repeat(np.arange(ranks), counts_R)
    wanted_B = routing.groups_BC[:, 0] * ranks // router.groups
    if budget is None:
        return Placement(home_B, wanted_B, home_B)
    rank_B = np.empty_like(order_B)
    rank_B[order_B] = assign(home_B[order_B], wanted_B[order_B], routing.atoms_B[order_B], ranks, budget)
    return Placement(home_B, wanted_B, rank_B)


def sent_bytes(routing: Routing, rows: RowBytes, router: RouterConfig, ranks: int, budget: float | None) -> Ints:
    """What ranks send each other for a slice, with migration within `budget` or, with None, without; -> [R, R]"""
    placement = place(routing, router, ranks, budget)
    sent_RR = _dispatch_bytes(routing, rows, router, placement.rank_B, ranks)
    if budget is not None:
        sent_RR += _migration_bytes(routing, rows, placement, ranks)
    np.fill_diagonal(sent_RR, 0)
    return sent_RR


def off_node(sent_RR: Ints, ranks_per_node: int) -> int:
    """The bytes between ranks of different nodes, each of which has that many neighbouring ranks."""
    node_R = np.arange(len(sent_RR)) // ranks_per_node
    return int(sent_RR[node_R[:, None] != node_R].sum())


def _dispatch_bytes(routing: Routing, rows: RowBytes, router: RouterConfig, rank_B: Ints, ranks: int) -> Ints:
    """In each layer: how many rows come for each expert, the rows and their way back, and the gradients of both."""
    layers, _, choices = routing.experts_LNK.shape
    source = np.tile(np.repeat(np.repeat(rank_B, routing.atoms_B), choices), layers)
    expert = routing.experts_LNK.reshape(-1)
    used = expert < router.experts
    rows_RR = _count(source[used], expert[used] * ranks // router.experts, ranks)
    return 2 * rows.state * (rows_RR + rows_RR.T) + layers * 8 * (router.experts // ranks)


def _migration_bytes(routing: Routing, rows: RowBytes, placement: Placement, ranks: int) -> Ints:
    """The all-gather of (atoms, bonds, rank) of all molecules, states there and gradients back, and the bytes."""
    home_B, _, rank_B = placement
    molecules_RR, atoms_RR, bonds_RR = (
        _count(home_B, rank_B, ranks, weights) for weights in (np.ones_like(home_B), routing.atoms_B, routing.bonds_B)
    )
    plan = 8 + 6 * int(molecules_RR.sum(axis=1).max())
    floats_RR = (rows.state + rows.shares) * (atoms_RR + atoms_RR.T)
    return plan + floats_RR + rows.molecule * molecules_RR + rows.atom * atoms_RR + rows.bond * bonds_RR


def _count(source: Ints, target: Ints, ranks: int, weights: Ints | None = None) -> Ints:
    counts = np.bincount(source * ranks + target, weights, ranks * ranks)
    return counts.astype(np.int64).reshape(ranks, ranks)
