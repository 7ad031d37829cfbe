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
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hmoe_ds.data.fill import lay_out, run_starts
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


class Window(NamedTuple):
    """R runs of B molecules in all, in the order in which they are dealt.

    Attributes:
        rows_B: rows of the store; those of a run are consecutive.
        num_atoms_B: atoms of each molecule.
        before_R3: R + 1 rows: the molecules, atoms and bonds before each run, then those of all. Runs that a curriculum
            does not admit are there, and empty.
    """

    rows_B: NDArray[np.int64]
    num_atoms_B: NDArray[np.int64]
    before_R3: NDArray[np.int64]

    @property
    def num_runs(self) -> int:
        return len(self.before_R3) - 1


class _Molecules(NamedTuple):
    """All molecules of a window in the order of its shards; run r is the `size_R[r]` of them from `first_R[r]` on."""

    first_R: NDArray[np.int64]
    size_R: NDArray[np.int64]
    rows_B: NDArray[np.int64]
    num_atoms_B: NDArray[np.uint16]
    num_bonds_B: NDArray[np.uint16]
    complexity_B: NDArray[np.float32]


class RunStream:
    """The stream of one dataset: `window` is what is at hand, `advance` moves on, `forget` lets go of what is behind.

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
        self._built: dict[tuple[int, int], _Molecules] = {}
        self._admitted: dict[tuple[int, int], Window] = {}
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

    def window(self) -> Window:
        """What is admitted of the window at the cursor, of which run `cursor.run` is the next."""
        here = (self.cursor.epoch, self.cursor.window)
        if here not in self._admitted:
            self._admitted[here] = Window(*lay_out(*self._molecules(*here), np.float32(self._bound)))
        return self._admitted[here]

    def advance(self, runs: int, molecules: int) -> None:
        """Leave `runs` runs of this window, of `molecules` molecules, behind."""
        self.cursor.run += runs
        self.cursor.dealt += molecules
        if self.cursor.run == self.window().num_runs:
            epoch, window = self._after(self.cursor.epoch, self.cursor.window)
            self.cursor = Cursor(epoch, window, 0, self.cursor.dealt)

    def _after(self, epoch: int, window: int) -> tuple[int, int]:
        return (epoch, window + 1) if window + 1 < self._windows_per_epoch else (epoch + 1, 0)

    def _molecules(self, epoch: int, window: int) -> _Molecules:
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

    def _build(self, epoch: int, window: int) -> _Molecules:
        columns = []
        for index in self._shards_of(epoch, window):
            shard = self._store.shard(index)
            rows = self._store.row_start[index] + np.arange(shard.rows)
            is_start = run_starts(shard.scaffold_key, self._longest)
            columns.append((is_start, rows, shard.num_atoms, shard.num_bonds, shard.complexity))
        is_start, rows, *sizes = (np.concatenate(column) for column in zip(*columns, strict=True))
        first = np.flatnonzero(is_start)
        size = np.diff(first, append=len(rows))
        # Different labels have different hashes, so no sort needs to be stable.
        shuffle = np.argsort(hash64(self._seed, epoch, 2 * self._number + 2, rows[first].astype(np.uint64)))
        return _Molecules(first[shuffle], size[shuffle], rows, *sizes)


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
