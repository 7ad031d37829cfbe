"""Which scaffolds go to which group."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Fewer molecules of a scaffold say nothing of where the gate sends it.
LEAST_MOLECULES = 3


class ScaffoldTable(NamedTuple):
    """Counts of molecules with S scaffolds in G groups; acyclic molecules are left out.

    Attributes:
        key_S: the scaffolds, the most frequent first.
        count_SG: molecules.
    """

    key_S: NDArray[np.int64]
    count_SG: NDArray[np.int64]


class TypicalScaffold(NamedTuple):
    """A scaffold of which a group gets more than its share.

    Attributes:
        key: of the scaffold.
        here: molecules with it in the group.
        total: molecules with it in all.
        enrichment: its share of the group's molecules over its share of all.
    """

    key: int
    here: int
    total: int
    enrichment: float


def scaffold_table(scaffold_key_B: NDArray[np.int64], group_B: NDArray[np.int64], groups: int) -> ScaffoldTable:
    """Count them."""
    cyclic_B = scaffold_key_B != 0
    key_S, scaffold_B = np.unique(scaffold_key_B[cyclic_B], return_inverse=True)
    count_SG = np.zeros((len(key_S), groups), np.int64)
    np.add.at(count_SG, (scaffold_B, group_B[cyclic_B]), 1)
    order_S = np.argsort(-count_SG.sum(axis=1), kind="stable")
    return ScaffoldTable(key_S[order_S], count_SG[order_S])


def typical_scaffolds(table: ScaffoldTable, group: int, most: int) -> list[TypicalScaffold]:
    """Those that tell most of the group from all: by share * log(enrichment), their parts of the relative entropy."""
    total_S, here_S = table.count_SG.sum(axis=1), table.count_SG[:, group]
    if not here_S.any():
        return []
    share_S = here_S / here_S.sum()
    enrichment_S = share_S / (total_S / total_S.sum())
    gain_S = share_S * np.log(np.where(enrichment_S > 0, enrichment_S, 1.0))
    chosen = [
        place
        for place in np.argsort(-gain_S, kind="stable")
        if here_S[place] >= LEAST_MOLECULES and enrichment_S[place] > 1
    ]
    return [
        TypicalScaffold(int(table.key_S[i]), int(here_S[i]), int(total_S[i]), float(enrichment_S[i]))
        for i in chosen[:most]
    ]
