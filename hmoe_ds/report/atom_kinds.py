"""Kinds of atoms that a chemist has a name for, and which expert takes which."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem

_AROMATIC, _IN_RING = 7, 8  # of the 9 features of an atom


class ExpertKinds(NamedTuple):
    """What an expert takes.

    Attributes:
        expert: its id.
        share: of all atoms.
        kinds: names of the most frequent kinds among its atoms, with their shares of these.
    """

    expert: int
    share: float
    kinds: list[tuple[str, float]]


def kinds_of(atom_features_N9: NDArray[np.uint8]) -> NDArray[np.str_]:
    """Such as `aromatic C`, `ring N`, `chain O`."""
    element_N = atom_features_N9[:, 0].astype(np.int64)
    place_N = np.where(atom_features_N9[:, _AROMATIC] > 0, 0, np.where(atom_features_N9[:, _IN_RING] > 0, 1, 2))
    code_N = element_N * 3 + place_N
    codes, index_N = np.unique(code_N, return_inverse=True)
    table = Chem.GetPeriodicTable()
    places = ("aromatic", "ring", "chain")
    names = [f"{places[code % 3]} {_symbol(table, int(code // 3) + 1)}" for code in codes]
    return np.array(names)[index_N]


def _symbol(table: Chem.PeriodicTable, number: int) -> str:
    # Open Graph Benchmark's last class is of all that is no known element.
    return table.GetElementSymbol(number) if number <= 118 else "other"


def expert_kinds(expert_N: NDArray[np.int64], kind_N: NDArray[np.str_], most: int) -> list[ExpertKinds]:
    """The `most` experts with the most atoms, and what these are."""
    experts, count_E = np.unique(expert_N, return_counts=True)
    found = []
    for place in np.argsort(-count_E, kind="stable")[:most]:
        names, count = np.unique(kind_N[expert_N == experts[place]], return_counts=True)
        order = np.argsort(-count, kind="stable")[:3]
        kinds = [(str(names[i]), float(count[i] / count_E[place])) for i in order]
        found.append(ExpertKinds(int(experts[place]), float(count_E[place] / len(expert_N)), kinds))
    return found
