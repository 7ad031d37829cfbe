"""Figures that say how a run is doing: routing health, losses of a step, and the file they are written to."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hmoe_ds.durable import flush, replace_text
from hmoe_ds.moe.balance import RouterLoad
from hmoe_ds.moe.exchange import Traffic
from hmoe_ds.objectives.gather import sum_over_ranks
from hmoe_ds.objectives.total import Losses


def group_entropy(molecules_G: Tensor) -> float:
    """Entropy of the shares of molecules over groups, as a fraction of its maximum log G (1 for one group)."""
    if len(molecules_G) == 1:
        return 1.0
    share_G = (molecules_G / molecules_G.sum()).double()
    return float(torch.special.entr(share_G).sum() / np.log(len(share_G)))


def load_imbalance(atoms_LE: Tensor, live_L: Tensor | None = None) -> float:
    """Load of the fullest expert over the mean load, averaged over layers; 1 is balanced.

    `live_L`: over how many experts of each layer the mean is taken; without it over all.
    """
    mean_L = atoms_LE.mean(dim=1) if live_L is None else atoms_LE.sum(dim=1) / live_L
    return float((atoms_LE.amax(dim=1) / mean_L).mean())


def rms_ratio(squares_L2: Tensor) -> float:
    """RMS of the routed output over that of the dense one beside it, averaged over layers; nan without a dense one."""
    return float((squares_L2[:, 0] / squares_L2[:, 1]).sqrt().mean())


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


class StepSums(NamedTuple):
    """Of one optimizer step, over all slices and ranks.

    Attributes:
        losses: of the global batch.
        load: where the global batch was routed.
        exchanged_bytes: what ranks sent each other for experts, in forwards and backwards.
        asked_to_stop: ranks that were asked to stop before the end of the step.
    """

    losses: Losses
    load: RouterLoad
    exchanged_bytes: Tensor
    asked_to_stop: Tensor


class StepTotals:
    """Figures of one optimizer step, added up over slices, then over ranks by one all-reduce.

    Args:
        traffic: of this rank; what it has counted before is of no step.
    """

    def __init__(self, traffic: Traffic) -> None:
        traffic.take()
        self._traffic = traffic
        self._losses: list[Losses] = []
        self._loads: list[RouterLoad] = []

    def add(self, losses: Losses, load: RouterLoad) -> None:
        """Add one slice of this rank."""
        self._losses.append(losses)
        self._loads.append(load)

    def reduce(self, asked_to_stop: bool = False) -> StepSums:
        """The global sums, the same on every rank; `asked_to_stop`: whether this one was."""
        losses = [
            torch.stack([value.detach().double() for value in entry]) for entry in zip(*self._losses, strict=True)
        ]
        loads = [torch.stack(list(entry)) for entry in zip(*self._loads, strict=True)]
        sent, asked = (losses[0].new_full((), number) for number in (self._traffic.take(), float(asked_to_stop)))
        *sums, exchanged, asked = sum_over_ranks([*(entry.sum(dim=0) for entry in (*losses, *loads)), sent, asked])
        return StepSums(Losses(*sums[: len(losses)]), RouterLoad(*sums[len(losses) :]), exchanged, asked)


class StepFile:
    """JSON lines of steps, such as `metrics.jsonl`: one object per line, each with at least `step`.

    Args:
        path: the file.
        after_step: lines of later steps are dropped; they belong to work that a resumed run does again.
    """

    def __init__(self, path: Path, after_step: int) -> None:
        kept = []
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= after_step]
        replace_text(path, "".join(line + "\n" for line in kept))
        self._path = path

    def write(self, figures: dict[str, float]) -> None:
        """Append one line; what is not a finite number becomes null, since JSON knows no other."""
        finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        with self._path.open("a") as file:
            file.write(json.dumps(finite) + "\n")

    def flush(self) -> None:
        """Have all lines on the disk."""
        flush(self._path)


def _step_of(line: str) -> float:
    # A run killed in the middle of a line leaves a fragment, which belongs to no step.
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return float("inf")
