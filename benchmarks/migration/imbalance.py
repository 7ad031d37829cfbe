"""How unevenly molecules want ranks and experts, and how much of that is due to common scaffolds."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hmoe_ds.config import RouterConfig
from hmoe_ds.moe.replay import Ints, Placement, Routing

_DRAWS = 20


class Imbalance(NamedTuple):
    """Largest over mean load of a slice.

    Attributes:
        wanted: atoms of ranks, if every molecule went to the rank of its group.
        placed: atoms of ranks, as molecules are placed within the budget.
        experts: atoms of experts; mean of the layers.
        one_per_scaffold: as `wanted`, of one molecule of each scaffold (all that are acyclic).
        as_many_at_random: as `wanted`, of as many molecules, drawn at random: what is above `one_per_scaffold` is due
            to scaffolds that are common.
        common: share of the atoms whose scaffold is the one with the most atoms.
        at_wanted: share of the atoms that are placed on the rank of their group.
    """

    wanted: float
    placed: float
    experts: float
    one_per_scaffold: float
    as_many_at_random: float
    common: float
    at_wanted: float


def imbalance(routing: Routing, placement: Placement, router: RouterConfig, ranks: int) -> Imbalance:
    """Of one slice."""
    atoms_B, wanted_B = routing.atoms_B, placement.wanted_B
    key_B = np.where(routing.scaffold_B == 0, -1 - np.arange(len(atoms_B)), routing.scaffold_B)
    _, first, scaffold_B = np.unique(key_B, return_index=True, return_inverse=True)
    generator = np.random.default_rng(0)
    drawn = [generator.choice(len(atoms_B), len(first), replace=False) for _ in range(_DRAWS)]
    experts = [np.bincount(of_layer.ravel(), minlength=router.experts) for of_layer in routing.experts_LNK]
    return Imbalance(
        wanted=_of_ranks(wanted_B, atoms_B, ranks),
        placed=_of_ranks(placement.rank_B, atoms_B, ranks),
        experts=float(np.mean([_max_over_mean(counts[: router.experts]) for counts in experts])),
        one_per_scaffold=_of_ranks(wanted_B[first], atoms_B[first], ranks),
        as_many_at_random=float(np.mean([_of_ranks(wanted_B[some], atoms_B[some], ranks) for some in drawn])),
        common=float(np.bincount(scaffold_B, atoms_B).max() / atoms_B.sum()),
        at_wanted=float(atoms_B[placement.rank_B == wanted_B].sum() / atoms_B.sum()),
    )


def _of_ranks(rank_B: Ints, atoms_B: Ints, ranks: int) -> float:
    return _max_over_mean(np.bincount(rank_B, atoms_B, ranks))


def _max_over_mean(load: NDArray[np.float64] | Ints) -> float:
    return float(load.max() / load.mean())
