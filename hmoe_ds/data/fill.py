"""The loops of a plan: where runs begin, a window in the order of its runs, and the filling of a slice run by run."""

from __future__ import annotations

import numba
import numpy as np


# One array per dataset comes as a tuple, for which numba compiles (and keeps) a function for each number of datasets.
@numba.njit(cache=True, nogil=True, error_model="numpy")
def fill(  # type: ignore[no-untyped-def]
    rows, num_atoms, before, first_row_S, epoch_S, weight_S, run_S, dealt_S, left_3, out_rows, out_epochs, out_atoms
):
    """Take runs until one does not fit into what is left, or the dataset whose turn it is has none here any more.

    A dataset's turn comes at the molecules that it dealt over its share; of several at once the first is taken.

    Args:
        rows, num_atoms, before: of each of S datasets the columns of its `Window`.
        first_row_S: what is added to its rows.
        epoch_S: of its window.
        weight_S: its share.
        run_S: its next run; moves on.
        dealt_S: molecules that it dealt; grows.
        left_3: molecules, atoms and bonds that may still be taken; shrinks.
        out_rows, out_epochs, out_atoms: of the molecules that are taken; there must be room.

    Returns:
        The molecules that were taken, and whether it was a run that did not fit which ended it.
    """
    taken = 0
    while True:
        source, soonest = -1, np.inf
        for s in range(run_S.size):
            turn = dealt_S[s] / weight_S[s]
            if turn < soonest:
                source, soonest = s, turn
        run, run_before = run_S[source], before[source]
        if run == len(run_before) - 1:
            return taken, False
        for budget in range(3):
            if run_before[run + 1, budget] - run_before[run, budget] > left_3[budget]:
                return taken, True
        for budget in range(3):
            left_3[budget] -= run_before[run + 1, budget] - run_before[run, budget]
        run_S[source] += 1
        dealt_S[source] += run_before[run + 1, 0] - run_before[run, 0]
        for position in range(run_before[run, 0], run_before[run + 1, 0]):
            out_rows[taken] = first_row_S[source] + rows[source][position]
            out_epochs[taken] = epoch_S[source]
            out_atoms[taken] = num_atoms[source][position]
            taken += 1


@numba.njit(cache=True, nogil=True)
def lay_out(first, size, rows, num_atoms, num_bonds, complexity, bound):  # type: ignore[no-untyped-def]
    """The columns of a `Window`: the runs of `size[r]` molecules from `first[r]` on, as far as `bound` admits them."""
    out_rows, out_atoms = np.empty(rows.size, np.int64), np.empty(rows.size, np.int64)
    before = np.zeros((first.size + 1, 3), np.int64)
    taken = 0
    for r in range(first.size):
        atoms, bonds = before[r, 1], before[r, 2]
        for position in range(first[r], first[r] + size[r]):
            if bound == np.inf or complexity[position] <= bound:
                out_rows[taken], out_atoms[taken] = rows[position], num_atoms[position]
                atoms += num_atoms[position]
                bonds += num_bonds[position]
                taken += 1
        before[r + 1, 0], before[r + 1, 1], before[r + 1, 2] = taken, atoms, bonds
    return out_rows[:taken], out_atoms[:taken], before


@numba.njit(cache=True, nogil=True)
def run_starts(scaffold_key, longest):  # type: ignore[no-untyped-def]
    """Where runs of neighbours with one scaffold begin, in a shard; no run is longer than `longest`.

    Acyclic molecules (key 0) have no scaffold in common, so each is a run of its own.
    """
    starts = np.empty(scaffold_key.size, np.bool_)
    length = 0
    for i in range(scaffold_key.size):
        key = scaffold_key[i]
        starts[i] = i == 0 or key == 0 or key != scaffold_key[i - 1] or length == longest
        length = 1 if starts[i] else length + 1
    return starts
