"""The global batch plan: which molecules make up optimizer step t, and which rank gets which of them.

Each dataset is an endless stream of runs (`runs.py`). A step is cut into `accumulation` slices, filled run by run up
to a molecule, an atom and a bond budget; with several datasets the next run is always of the one that is furthest
behind its share of the molecules dealt so far.

All of it is a function of (datasets, seed, step, curriculum): no rank takes part in any decision, and the position is
four integers for each dataset. What a step holds never depends on the number of ranks; only `deal` does.

A curriculum admits the molecules whose complexity is at most a quantile of their dataset, the step's competence; the
others are skipped in this epoch. The quantile is of each dataset on its own, so that none of a mixture is without
molecules at any competence, and the shares hold from the first step. From competence 1 on, an epoch is the whole
dataset again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hmoe_ds.config import ConfigError, DataConfig
from hmoe_ds.data.fill import fill
from hmoe_ds.data.mixture import Mixture
from hmoe_ds.data.runs import Cursor, RunStream, prefix, runs_within


class Slice(NamedTuple):
    """The molecules of one forward and backward over all ranks; B molecules.

    `epoch_B` is the epoch of each molecule, in which it is dealt at most once: a step may reach over the end of one.
    """

    rows_B: NDArray[np.int64]
    epoch_B: NDArray[np.int64]
    num_atoms_B: NDArray[np.int64]


class BatchPlan:
    """Iterates over optimizer steps; `state_dict` / `load_state_dict` save and restore the position.

    Args:
        mixture: the molecules.
        data: budgets of one step, all ranks together.
        accumulation: slices per step; each gets an equal share of the budgets.
        seed: of the order.

    Raises:
        ConfigError: an empty dataset, or a budget that some run of molecules cannot meet.
    """

    def __init__(self, mixture: Mixture, data: DataConfig, accumulation: int, seed: int) -> None:
        self._mixture, self._data = mixture, data
        self._accumulation = accumulation
        self._budgets = (
            data.molecules_per_step // accumulation,
            data.atoms_per_step // accumulation,
            data.bonds_per_step // accumulation,
        )
        self._check_budgets()
        self._streams = [
            RunStream(store, data.window_shards, data.scaffold_run, seed, number)
            for number, store in enumerate(mixture.stores)
        ]

    def next_step(self, competence: float = 1.0) -> list[Slice]:
        """The slices of the next optimizer step; moves on. The molecules of earlier steps may be gone from now on.

        Args:
            competence: share of each dataset that is admitted, by complexity; a function of the step.
        """
        for stream in self._streams:
            stream.forget()
            stream.admit(competence)
        return [self._next_slice() for _ in range(self._accumulation)]

    def state_dict(self) -> dict[str, Any]:
        """The position, as plain data: one cursor per dataset, and the percentiles of complexity that it began with."""
        return {
            "cursors": [asdict(stream.cursor) for stream in self._streams],
            "complexity_percentiles": [stream.percentiles for stream in self._streams],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the position that `state_dict` gave."""
        for stream, cursor in zip(self._streams, state["cursors"], strict=True):
            stream.cursor = Cursor(**cursor)
        if "complexity_percentiles" in state:  # of a run that is older than the curriculum there are none
            for stream, percentiles in zip(self._streams, state["complexity_percentiles"], strict=True):
                stream.percentiles = percentiles

    def _next_slice(self) -> Slice:
        left_3, parts, full = np.array(self._budgets), [], False
        while not full:
            part, full = self._fill(left_3)
            parts.append(part)
        return parts[0] if len(parts) == 1 else Slice(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def _fill(self, left_3: NDArray[np.int64]) -> tuple[Slice, bool]:
        """What comes next of the windows at hand, up to the budgets `left_3`, which shrink; whether they bound it."""
        cursors = [stream.cursor for stream in self._streams]
        rows, num_atoms, before = zip(*(stream.window() for stream in self._streams), strict=True)
        epoch_S, run_S, dealt_S = np.array([(cursor.epoch, cursor.run, cursor.dealt) for cursor in cursors]).T.copy()
        room = min(int(left_3[0]), sum(map(len, rows)))
        part = Slice(np.empty(room, np.int64), np.empty(room, np.int64), np.empty(room, np.int64))
        first_row_S, weight_S = self._mixture.first_row_S, self._mixture.weight_S
        taken, full = fill(rows, num_atoms, before, first_row_S, epoch_S, weight_S, run_S, dealt_S, left_3, *part)
        for stream, cursor, run, dealt in zip(self._streams, cursors, run_S.tolist(), dealt_S.tolist(), strict=True):
            stream.advance(run - cursor.run, dealt - cursor.dealt)
        return Slice(*(column[:taken] for column in part)), full

    def _check_budgets(self) -> None:
        for store in self._mixture.stores:
            if not len(store):
                raise ConfigError(
                    f"data.path {store.path} has no molecules to train on: prepare more of them with `hmoe prepare`"
                )
        run = self._data.scaffold_run
        for name in ("atoms", "bonds"):
            largest = max(getattr(store, f"max_{name}") for store in self._mixture.stores)
            budget = getattr(self._data, f"{name}_per_step")
            needed = self._accumulation * run * largest
            if budget < needed:
                raise ConfigError(
                    f"data.{name}_per_step is {budget}, but one slice must hold data.scaffold_run {run} molecules "
                    f"of up to {largest} {name}: set data.{name}_per_step to at least {needed}, lower "
                    "data.scaffold_run, or prepare the dataset with a smaller --max-atoms"
                )


def deal(num_atoms_B: NDArray[np.int64], ranks: int) -> NDArray[np.int64]:
    """The rank of each molecule of a slice, so that ranks get nearly equal numbers of atoms and molecules.

    Molecules are dealt largest first, there and back again over the ranks (0, 1, ..., R-1, R-1, ..., 0).
    """
    order = np.argsort(-num_atoms_B, kind="stable")
    position = np.arange(len(order)) % (2 * ranks)
    rank_B = np.empty(len(order), np.int64)
    rank_B[order] = np.minimum(position, 2 * ranks - 1 - position)
    return rank_B


def dealt_order(num_atoms_B: NDArray[np.int64], ranks: int) -> tuple[NDArray[np.int64], list[int]]:
    """The molecules of a slice in the order in which they lie when gathered rank by rank; how many each rank has."""
    rank_B = deal(num_atoms_B, ranks)
    return np.argsort(rank_B, kind="stable"), np.bincount(rank_B, minlength=ranks).tolist()


def sequential_slices(mixture: Mixture, data: DataConfig, molecules: int) -> list[Slice]:
    """The first molecules of each dataset in stored order, `molecules` in all, cut to the budgets of one step.

    Each dataset provides its share of them, as far as it has so many.
    """
    columns = [(np.empty(0, np.int64),) * 3]
    counts = mixture.first_molecules(molecules)
    for store, first_row, wanted in zip(mixture.stores, mixture.first_row_S, counts, strict=True):
        needed = store.first_shards(wanted)
        store.window(needed)
        shards = [store.shard(index) for index in needed]
        atoms, bonds = (
            np.concatenate([np.empty(0, np.int64), *(getattr(shard, name) for shard in shards)])[:wanted]
            for name in ("num_atoms", "num_bonds")
        )
        columns.append((first_row + np.arange(wanted), atoms, bonds))
    rows, atoms, bonds = (np.concatenate(column) for column in zip(*columns, strict=True))
    return [
        Slice(rows[span], np.zeros(len(rows[span]), np.int64), atoms[span])
        for span in within_budgets(atoms, bonds, data)
    ]


def within_budgets(num_atoms_B: NDArray[np.int64], num_bonds_B: NDArray[np.int64], data: DataConfig) -> Iterator[slice]:
    """Cut B molecules, in their order, to the budgets of one step; one that is larger than a whole budget is alone."""
    befores = (np.arange(len(num_atoms_B) + 1), prefix(num_atoms_B), prefix(num_bonds_B))
    budgets = (data.molecules_per_step, data.atoms_per_step, data.bonds_per_step)
    first = 0
    while first < len(num_atoms_B):
        last = min(runs_within(before, first, budget) for before, budget in zip(befores, budgets, strict=True))
        last = max(last, first + 1)
        yield slice(first, last)
        first = last
