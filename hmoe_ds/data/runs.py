"""The endless stream of one dataset: its runs of molecules with one scaffold, in the order in which they are dealt.

The stream walks the shards in random order through a window of shards. Inside a window the molecules are shuffled
as *runs*: neighbours with one scaffold, at most `scaffold_run` of them, are dealt together, because the
contrastive loss needs positives and a random batch has hardly any (about 10% of molecules). When the last window
is dealt, the next epoch begins with other orders.

A curriculum admits molecules up to some complexity. The order is the same with and without it: what is not admitted
when its turn comes is skipped, and has its next turn in the next epoch. So a molecule is dealt at most once in an
epoch, whenever the bound rises, and the position needs no other state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hmoe_ds.data.hashing import hash64
from hmoe_ds.data.store import ShardStore


@dataclass
class Cursor:
    """Where a stream stands: the next run is run `run` of window `window` of epoch `epoch`, after `dealt` molecules.

    Runs that were skipped count in `run`, but molecules that were skipped do not count in `dealt`.
    """

    epoch: int = 0
    window: int = 0
    run: int = 0
    dealt: int = 0


class Runs(NamedTuple):
    """R consecutive runs of B molecules in all.

    Attributes:
        rows_B: rows of the store; those of a run are consecutive.
        epoch_B: epoch of each molecule, from 0: it is dealt at most once in each.
        num_atoms_B: atoms of each molecule.
        molecules_R: molecules of each run; 0 when none of it is admitted.
        atoms_R: atoms of each run.
        bonds_R: bonds of each run.
    """

    rows_B: NDArray[np.int64]
    epoch_B: NDArray[np.int64]
    num_atoms_B: NDArray[np.int64]
    molecules_R: NDArray[np.int64]
    atoms_R: NDArray[np.int64]
    bonds_R: NDArray[np.int64]


class _Window(NamedTuple):
    """The runs of one window in the order in which they are dealt; prefix sums have length runs + 1."""

    rows: NDArray[np.int64]
    num_atoms: NDArray[np.int64]
    num_bonds: NDArray[np.int64]
    complexity: NDArray[np.float32]
    molecules_before: NDArray[np.int64]
    atoms_before: NDArray[np.int64]
    bonds_before: NDArray[np.int64]

    @property
    def num_runs(self) -> int:
        return len(self.molecules_before) - 1

    @property
    def befores(self) -> tuple[NDArray[np.int64], ...]:
        """The prefix sums, in the order of the budgets."""
        return self.molecules_before, self.atoms_before, self.bonds_before

    @classmethod
    def of(
        cls,
        rows: NDArray[np.int64],
        num_atoms: NDArray[np.int64],
        num_bonds: NDArray[np.int64],
        complexity: NDArray[np.float32],
        before: NDArray[np.int64],
    ) -> _Window:
        """The window of these molecules, which lie run by run; `before` are the molecules before each run."""
        return cls(rows, num_atoms, num_bonds, complexity, before, prefix(num_atoms)[before], prefix(num_bonds)[before])

    def admitted(self, bound: float) -> _Window:
        """Only the molecules up to this complexity. Runs keep their numbers: some get shorter, some empty."""
        if bound == math.inf:
            return self
        keep = self.complexity <= bound
        columns = (self.rows[keep], self.num_atoms[keep], self.num_bonds[keep], self.complexity[keep])
        return _Window.of(*columns, prefix(keep.astype(np.int64))[self.molecules_before])

    def part(self, first: int, last: int, epoch: int) -> Runs:
        """Runs `first` to `last - 1`."""
        taken = slice(self.molecules_before[first], self.molecules_before[last])
        rows = self.rows[taken]
        sizes = (np.diff(before[first : last + 1]) for before in self.befores)
        return Runs(rows, np.full(len(rows), epoch), self.num_atoms[taken], *sizes)


class RunStream:
    """The stream of one dataset: `peek` looks ahead, `advance` moves on, `forget` lets go of what is behind.

    Args:
        store: the molecules; there must be some.
        window_shards: shards whose molecules are shuffled together.
        scaffold_run: molecules of a run, at most.
        seed: of the order.
        number: number of the dataset in its mixture, so that two of them have different orders.

    Attributes:
        cursor: the position.
        percentiles: percentiles 0, 1, ..., 100 of complexity, by which `admit` bounds what is dealt.
    """

    def __init__(self, store: ShardStore, window_shards: int, scaffold_run: int, seed: int, number: int = 0) -> None:
        self._store, self._width, self._longest = store, window_shards, scaffold_run
        self._seed, self._number = seed, number
        self._shards = np.flatnonzero(np.diff(store.row_start))
        self._windows_per_epoch = -(-len(self._shards) // window_shards)
        self._built: dict[tuple[int, int], _Window] = {}
        self._admitted: dict[tuple[int, int], _Window] = {}
        self._bound = math.inf
        self.cursor = Cursor()
        self.percentiles = store.complexity_percentiles

    def forget(self) -> None:
        """Let go of the windows behind: their molecules are no longer looked at."""
        here = (self.cursor.epoch, self.cursor.window)
        self._built = {key: window for key, window in self._built.items() if key >= here}
        self._admitted = {key: window for key, window in self._admitted.items() if key >= here}

    def admit(self, competence: float) -> None:
        """From now on, deal the molecules whose complexity is at most this quantile, to the nearest percentile."""
        percent = round(100 * competence)
        bound = self.percentiles[percent] if percent < 100 else math.inf
        if bound != self._bound:
            self._bound, self._admitted = bound, {}

    def peek(self, molecules: int, atoms: int, bonds: int) -> Runs:
        """The next runs up to these budgets, and the first one that exceeds them."""
        epoch, window, first = self.cursor.epoch, self.cursor.window, self.cursor.run
        left = np.array([molecules, atoms, bonds])
        parts: list[Runs] = []
        while True:
            runs = self._window(epoch, window)
            within = min(
                runs_within(before, first, int(budget)) for before, budget in zip(runs.befores, left, strict=True)
            )
            last = min(within + 1, runs.num_runs)
            parts.append(runs.part(first, last, epoch))
            if within < runs.num_runs:
                return Runs(*(np.concatenate(column) for column in zip(*parts, strict=True)))
            left -= [before[last] - before[first] for before in runs.befores]
            epoch, window = self._after(epoch, window)
            first = 0

    def advance(self, runs: int, molecules: int) -> None:
        """Leave `runs` runs of `molecules` molecules behind."""
        cursor = replace(self.cursor)
        cursor.run += runs
        cursor.dealt += molecules
        while cursor.run >= (size := self._window(cursor.epoch, cursor.window).num_runs):
            cursor.run -= size
            cursor.epoch, cursor.window = self._after(cursor.epoch, cursor.window)
        self.cursor = cursor

    def _after(self, epoch: int, window: int) -> tuple[int, int]:
        return (epoch, window + 1) if window + 1 < self._windows_per_epoch else (epoch + 1, 0)

    def _window(self, epoch: int, window: int) -> _Window:
        """What is admitted of a window."""
        if (epoch, window) not in self._admitted:
            self._admitted[epoch, window] = self._whole_window(epoch, window).admitted(self._bound)
        return self._admitted[epoch, window]

    def _whole_window(self, epoch: int, window: int) -> _Window:
        if (epoch, window) not in self._built:
            keys = [*self._built, (epoch, window)]
            current = sorted({index for key in keys for index in self._shards_of(*key)})
            self._store.window(current, self._shards_of(*self._after(epoch, window)))
            self._built[epoch, window] = self._build(epoch, window)
        return self._built[epoch, window]

    def _shards_of(self, epoch: int, window: int) -> list[int]:
        order = np.argsort(
            hash64(self._seed, epoch, 2 * self._number + 1, self._shards.astype(np.uint64)), kind="stable"
        )
        return self._shards[order[window * self._width : (window + 1) * self._width]].tolist()

    def _build(self, epoch: int, window: int) -> _Window:
        columns = []
        for index in self._shards_of(epoch, window):
            shard = self._store.shard(index)
            rows = self._store.row_start[index] + np.arange(shard.rows)
            is_start = run_starts(shard.scaffold_key, self._longest)
            columns.append((rows, is_start, shard.num_atoms, shard.num_bonds, shard.complexity))
        rows, is_start, *sizes, complexity = (np.concatenate(column) for column in zip(*columns, strict=True))
        atoms, bonds = (size.astype(np.int64) for size in sizes)
        first = np.flatnonzero(is_start)
        size = np.diff(first, append=len(rows))
        label = rows[first].astype(np.uint64)
        shuffle = np.argsort(hash64(self._seed, epoch, 2 * self._number + 2, label), kind="stable")
        first, size = first[shuffle], size[shuffle]
        take = spans(first, size)
        return _Window.of(rows[take], atoms[take], bonds[take], complexity[take], prefix(size))


def run_starts(scaffold_key: NDArray[np.uint64], longest: int) -> NDArray[np.bool_]:
    """Where runs of neighbours with one scaffold begin, in a shard; no run is longer than `longest`.

    Acyclic molecules (key 0) have no scaffold in common, so each is a run of its own.
    """
    change = np.ones(len(scaffold_key), np.bool_)
    change[1:] = scaffold_key[1:] != scaffold_key[:-1]
    position = np.arange(len(scaffold_key))
    since_change = position - np.maximum.accumulate(np.where(change, position, 0))
    return change | (scaffold_key == 0) | (since_change % longest == 0)


def prefix(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """0, then the running sums."""
    return np.concatenate([[0], np.cumsum(values)])


def spans(first: NDArray[np.int64], size: NDArray[np.int64]) -> NDArray[np.int64]:
    """The positions of `size[r]` neighbours from `first[r]` on, for one r after the other."""
    before = prefix(size)
    return np.repeat(first - before[:-1], size) + np.arange(before[-1])


def runs_within(before: NDArray[np.int64], first: int, budget: int) -> int:
    """The largest `last` so that the runs first..last-1 hold at most `budget`, by the prefix sums `before`."""
    return int(np.searchsorted(before, before[first] + budget, side="right")) - 1
