"""The global batch plan: which molecules make up optimizer step t, and which rank gets which of them.

The plan walks the shards in random order through a window of shards. Inside a window the molecules are
shuffled as *runs*: neighbours with one scaffold, at most `scaffold_run` of them, are dealt together, because
the contrastive loss needs positives and a random batch has hardly any (about 10% of molecules). A step is cut
into `accumulation` slices, filled run by run up to a molecule, an atom and a bond budget.

All of it is a function of (dataset, seed, step): no rank takes part in any decision, and the state is three
integers. What a step holds never depends on the number of ranks; only `deal` does.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hmoe_ds.config import ConfigError, DataConfig
from hmoe_ds.data.hashing import hash64
from hmoe_ds.data.store import ShardStore


@dataclass
class Cursor:
    """Where the plan stands: the next run to deal is run `run` of window `window` of epoch `epoch`."""

    epoch: int = 0
    window: int = 0
    run: int = 0


class Slice(NamedTuple):
    """The molecules of one forward and backward over all ranks; B molecules.

    `epoch_B` says how often a molecule was dealt before: a step may reach over the end of an epoch.
    """

    rows_B: NDArray[np.int64]
    epoch_B: NDArray[np.int64]
    num_atoms_B: NDArray[np.int64]


class _Window(NamedTuple):
    """The runs of one window in the order in which they are dealt; prefix sums have length runs + 1."""

    rows: NDArray[np.int64]
    num_atoms: NDArray[np.int64]
    molecules_before: NDArray[np.int64]
    atoms_before: NDArray[np.int64]
    bonds_before: NDArray[np.int64]


class BatchPlan:
    """Iterates over optimizer steps; `state_dict` / `load_state_dict` save and restore the position.

    Args:
        store: the molecules.
        data: budgets of one step, all ranks together.
        accumulation: slices per step; each gets an equal share of the budgets.
        seed: of the order.

    Raises:
        ConfigError: an empty dataset, or a budget that some run of molecules cannot meet.
    """

    def __init__(self, store: ShardStore, data: DataConfig, accumulation: int, seed: int) -> None:
        self._store, self._data, self._seed = store, data, seed
        self._accumulation = accumulation
        self._molecules = data.molecules_per_step // accumulation
        self._atoms = data.atoms_per_step // accumulation
        self._bonds = data.bonds_per_step // accumulation
        self._check_budgets()
        self._shards = np.flatnonzero(np.diff(store.row_start))
        self.cursor = Cursor()
        self._cached: tuple[tuple[int, int], _Window] | None = None

    def next_step(self) -> list[Slice]:
        """The slices of the next optimizer step; moves the cursor."""
        return [self._next_slice() for _ in range(self._accumulation)]

    def state_dict(self) -> dict[str, Any]:
        """The position, as plain data: one cursor per dataset."""
        return {"cursors": [asdict(self.cursor)]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the position that `state_dict` gave."""
        (cursor,) = state["cursors"]
        self.cursor = Cursor(**cursor)

    def _next_slice(self) -> Slice:
        molecules, atoms, bonds = self._molecules, self._atoms, self._bonds
        parts: list[Slice] = []
        while True:
            window, first = self._window(), self.cursor.run
            last = min(
                _runs_within(window.molecules_before, first, molecules),
                _runs_within(window.atoms_before, first, atoms),
                _runs_within(window.bonds_before, first, bonds),
            )
            taken = slice(window.molecules_before[first], window.molecules_before[last])
            rows = window.rows[taken]
            parts.append(Slice(rows, np.full(len(rows), self.cursor.epoch), window.num_atoms[taken]))
            self.cursor.run = last
            if last < len(window.molecules_before) - 1:
                return Slice(*(np.concatenate(column) for column in zip(*parts, strict=True)))
            molecules -= len(rows)
            atoms -= int(window.atoms_before[last] - window.atoms_before[first])
            bonds -= int(window.bonds_before[last] - window.bonds_before[first])
            self._next_window()

    def _next_window(self) -> None:
        windows = -(-len(self._shards) // self._data.window_shards)
        epoch, window = self.cursor.epoch, self.cursor.window + 1
        self.cursor = Cursor(epoch, window, 0) if window < windows else Cursor(epoch + 1, 0, 0)

    def _window(self) -> _Window:
        key = (self.cursor.epoch, self.cursor.window)
        if self._cached is None or self._cached[0] != key:
            self._cached = (key, self._build_window(*key))
        return self._cached[1]

    def _build_window(self, epoch: int, window: int) -> _Window:
        order = np.argsort(hash64(self._seed, epoch, 1, self._shards.astype(np.uint64)), kind="stable")
        width = self._data.window_shards
        columns = []
        for index in self._shards[order[window * width : (window + 1) * width]].tolist():
            shard = self._store.shard(index)
            rows = self._store.row_start[index] + np.arange(shard.rows)
            starts = run_starts(shard.scaffold_key, self._data.scaffold_run)
            columns.append((rows, shard.num_atoms, shard.num_bonds, starts))
        rows, atoms, bonds, is_start = (np.concatenate(c).astype(np.int64) for c in zip(*columns, strict=True))
        first = np.flatnonzero(is_start)
        size = np.diff(first, append=len(rows))
        shuffle = np.argsort(hash64(self._seed, epoch, 2, rows[first].astype(np.uint64)), kind="stable")
        first, size = first[shuffle], size[shuffle]
        before = np.concatenate([[0], np.cumsum(size)])
        take = np.repeat(first - before[:-1], size) + np.arange(before[-1])
        rows, atoms, bonds = rows[take], atoms[take], bonds[take]
        return _Window(rows, atoms, before, _prefix(atoms)[before], _prefix(bonds)[before])

    def _check_budgets(self) -> None:
        if not len(self._store):
            raise ConfigError(
                f"data.path {self._data.path} has no molecules to train on: prepare more of them with `hmoe prepare`"
            )
        statistics, run = self._store.statistics, self._data.scaffold_run
        for name, largest in (("atoms", statistics.max_atoms), ("bonds", statistics.max_bonds)):
            budget = getattr(self._data, f"{name}_per_step")
            needed = self._accumulation * run * largest
            if budget < needed:
                raise ConfigError(
                    f"data.{name}_per_step is {budget}, but one slice must hold data.scaffold_run {run} molecules "
                    f"of up to {largest} {name}: set data.{name}_per_step to at least {needed}, lower "
                    "data.scaffold_run, or prepare the dataset with a smaller --max-atoms"
                )


def run_starts(scaffold_key: NDArray[np.uint64], longest: int) -> NDArray[np.bool_]:
    """Where runs of neighbours with one scaffold begin, in a shard; no run is longer than `longest`.

    Acyclic molecules (key 0) have no scaffold in common, so each is a run of its own.
    """
    change = np.ones(len(scaffold_key), np.bool_)
    change[1:] = scaffold_key[1:] != scaffold_key[:-1]
    position = np.arange(len(scaffold_key))
    since_change = position - np.maximum.accumulate(np.where(change, position, 0))
    return change | (scaffold_key == 0) | (since_change % longest == 0)


def deal(num_atoms_B: NDArray[np.int64], ranks: int) -> NDArray[np.int64]:
    """The rank of each molecule of a slice, so that ranks get nearly equal numbers of atoms and molecules.

    Molecules are dealt largest first, there and back again over the ranks (0, 1, ..., R-1, R-1, ..., 0).
    """
    order = np.argsort(-num_atoms_B, kind="stable")
    position = np.arange(len(order)) % (2 * ranks)
    rank_B = np.empty(len(order), np.int64)
    rank_B[order] = np.minimum(position, 2 * ranks - 1 - position)
    return rank_B


def sequential_slices(store: ShardStore, data: DataConfig, molecules: int) -> list[Slice]:
    """The first `molecules` molecules of a split in stored order, cut to the budgets of one step.

    A molecule larger than a whole budget gets a slice of its own.
    """
    needed = max(1, int(np.searchsorted(store.row_start, molecules)))
    shards = [store.shard(index) for index in range(min(needed, store.num_shards))]
    atoms = np.concatenate([shard.num_atoms for shard in shards])[:molecules].astype(np.int64)
    bonds = np.concatenate([shard.num_bonds for shard in shards])[:molecules].astype(np.int64)
    prefix = (np.arange(len(atoms) + 1), _prefix(atoms), _prefix(bonds))
    budgets = (data.molecules_per_step, data.atoms_per_step, data.bonds_per_step)
    slices, first = [], 0
    while first < len(atoms):
        last = min(_runs_within(before, first, budget) for before, budget in zip(prefix, budgets, strict=True))
        last = max(last, first + 1)
        slices.append(Slice(np.arange(first, last), np.zeros(last - first, np.int64), atoms[first:last]))
        first = last
    return slices


def _prefix(values: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(values)])


def _runs_within(before: NDArray[np.int64], first: int, budget: int) -> int:
    """The largest `last` so that the runs first..last-1 hold at most `budget`."""
    return int(np.searchsorted(before, before[first] + budget, side="right")) - 1
