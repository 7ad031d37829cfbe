"""How far the scaffold gate sends molecules with one scaffold to one group."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def mutual_information(scaffold_key: NDArray[np.int64], group: NDArray[np.int64]) -> float:
    """Normalised mutual information of scaffolds and groups: 2 I / (H_scaffold + H_group), in [0, 1].

    Acyclic molecules (key 0) are left out; nan when there are no others, 0 when nothing varies. With many scaffolds of
    few molecules it is above 0 by chance, so compare it between gates, on the same molecules.
    """
    cyclic = scaffold_key != 0
    scaffold = np.unique(scaffold_key[cyclic], return_inverse=True)[1]
    if not len(scaffold):
        return float("nan")
    table = np.zeros((scaffold.max() + 1, group.max() + 1))
    np.add.at(table, (scaffold, group[cyclic]), 1)
    joint, rows, columns = (_entropy(counts) for counts in (table.ravel(), table.sum(axis=1), table.sum(axis=0)))
    return 2 * (rows + columns - joint) / (rows + columns) if rows + columns > 0 else 0.0


def _entropy(counts: NDArray[np.float64]) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def consistency(scaffold_key: NDArray[np.int64], group: NDArray[np.int64]) -> float:
    """Do molecules with one scaffold go to one group, beyond chance?

    `(A_same - A_diff) / (1 - A_diff)`: A_same is the agreement of the group among pairs with one scaffold, averaged per
    scaffold; A_diff is the agreement among pairs with different scaffolds. Acyclic molecules (key 0) are left
    out. A gate that sends all molecules to one group scores 0; nan when there are no pairs to compare.
    """
    cyclic = scaffold_key != 0
    scaffold = np.unique(scaffold_key[cyclic], return_inverse=True)[1]
    table = np.zeros((scaffold.max(initial=-1) + 1, group.max(initial=0) + 1))
    np.add.at(table, (scaffold, group[cyclic]), 1)
    size_S = table.sum(axis=1)
    agreeing_S = (table * (table - 1)).sum(axis=1)
    pairs_S = size_S * (size_S - 1)
    totals = table.sum(axis=0)
    different_pairs = size_S.sum() * (size_S.sum() - 1) - pairs_S.sum()
    different_agreeing = (totals * (totals - 1)).sum() - agreeing_S.sum()
    if not pairs_S.any() or not different_pairs:
        return float("nan")
    a_same = float((agreeing_S[pairs_S > 0] / pairs_S[pairs_S > 0]).mean())
    a_diff = float(different_agreeing / different_pairs)
    return (a_same - a_diff) / (1 - a_diff) if a_diff < 1 else 0.0
