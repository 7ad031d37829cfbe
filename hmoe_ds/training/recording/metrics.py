"""Figures that say how a run is doing: routing health, losses of a step, and the file they are written to."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_pipeline.durable import append_line, flush, replace_text
from hmoe_ds.moe.balance import RouterLoad
from hmoe_ds.moe.exchange import Traffic
from hmoe_ds.objectives.gather import sum_over_ranks
from hmoe_ds.objectives.total import Losses
from hmoe_ds.training.best_effort import BestEffort

_MAX_UNWRITTEN = 10_000  # lines that wait for a disk; the oldest go first


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


def starved_share(atoms_LE: Tensor, live_L: Tensor | None = None) -> float:
    """Share of the experts that have less than a tenth of the mean load of their layer.

    `live_L`: how many experts of each layer live; the others, which have no load, do not count.
    """
    live_L = torch.full_like(atoms_LE[:, 0], atoms_LE.shape[1]) if live_L is None else live_L
    mean_L = atoms_LE.sum(dim=1) / live_L
    starved_L = (atoms_LE < 0.1 * mean_L.unsqueeze(1)).sum(dim=1) - (atoms_LE.shape[1] - live_L)
    return float(starved_L.sum() / live_L.sum())


def rms_ratio(squares_L2: Tensor) -> float:
    """RMS of the routed output over that of the dense one beside it, averaged over layers; nan without a dense one."""
    return float((squares_L2[:, 0] / squares_L2[:, 1]).sqrt().mean())


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
        traffic.forget()
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

    Where the file cannot be written, as on a full disk, lines wait for the next one, and the training goes on.

    Args:
        path: the file.
        after_step: lines of later steps are dropped; they belong to work that a resumed run does again.
    """

    def __init__(self, path: Path, after_step: int) -> None:
        kept = []
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= after_step]
        replace_text(path, "".join(line + "\n" for line in kept))
        self._path, self._effort = path, BestEffort(str(path))
        self._unwritten: deque[str] = deque(maxlen=_MAX_UNWRITTEN)

    def write(self, figures: Mapping[str, Any]) -> None:
        """Append one line; a number that is not finite becomes null, since JSON knows no other."""
        self._unwritten.append(json.dumps({name: _finite(value) for name, value in figures.items()}))
        with self._effort:
            self._write_all()

    def flush(self) -> None:
        """Have all lines on the disk."""
        with self._effort:
            self._write_all()
            flush(self._path)

    def _write_all(self) -> None:
        while self._unwritten:
            append_line(self._path, self._unwritten[0])
            self._unwritten.popleft()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def last_figures(path: Path, prefixes: tuple[str, ...]) -> dict[str, float]:
    """The last value of each figure of a file of steps whose name begins so."""
    found: dict[str, float] = {}
    for line in path.read_text().splitlines():
        if any(prefix in line for prefix in prefixes):
            figures = json.loads(line).items()
            found |= {name: value for name, value in figures if name.startswith(prefixes) and value is not None}
    return found


def _step_of(line: str) -> float:
    # A run killed in the middle of a line leaves a fragment, which belongs to no step.
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return float("inf")
