"""Runs trials, several at a time, and keeps what came of them."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

from benchmarks.ablation.datasets import Datasets
from benchmarks.ablation.trial import RESULT, TRIAL, Figures, Settings, Trial, training_flops

_WARMUP = Fraction(1, 12)


class OutOfTimeError(Exception):
    """What is asked for cannot be run any more; what has run is kept."""


def _resolved(settings: Settings, steps: int) -> Settings:
    """`settings` with numbers of steps in place of fractions."""
    return {
        name: max(1, round(value * steps)) if isinstance(value, Fraction) else value for name, value in settings.items()
    }


@dataclass
class Bench:
    """Where trials run.

    Args:
        out: folder of all trials.
        datasets: what they train on.
        base: settings that all of them have.
        step_flops: training FLOPs that count as one step; a trial whose steps take more has fewer of them.
        workers: trials at a time, one thread each.
        deadline: time (`time.time`) after which none is started.
    """

    out: Path
    datasets: Datasets
    base: Settings
    step_flops: float
    workers: int
    deadline: float
    _flops: dict[str, float] = field(default_factory=dict)

    def trial(self, settings: Settings, seed: int, steps: int, reported: bool = False) -> Trial:
        """The trial with the training FLOPs of `steps` steps. A fraction among the settings is one of its steps."""
        merged = {**self.base, "optim.warmup_steps": _WARMUP, **settings}
        own_steps = round(steps * self.step_flops / self.flops(_resolved(merged, steps)))
        return Trial(_resolved(merged, own_steps), seed, own_steps, reported)

    def flops(self, settings: Settings) -> float:
        """Training FLOPs of one step with `settings`, all of them."""
        shapes = {name: value for name, value in settings.items() if not name.startswith("optim.")}
        key = json.dumps(shapes, sort_keys=True)
        if key not in self._flops:
            self._flops[key] = training_flops(settings, self.datasets)
        return self._flops[key]

    def run(self, trials: Sequence[Trial]) -> list[Figures]:
        """Figures of all trials, in their order; runs those that have not run.

        Raises:
            OutOfTimeError: some could not be started before the deadline.
            RuntimeError: one failed.
        """
        with ThreadPoolExecutor(self.workers) as pool:
            figures = list(pool.map(self._run, trials))
        late = sum(found is None for found in figures)
        if late:
            raise OutOfTimeError(f"{late} of {len(trials)} trials are left")
        return [found for found in figures if found is not None]

    def _run(self, trial: Trial) -> Figures | None:
        folder = self.out / trial.name
        if not (folder / RESULT).exists():
            if time.time() > self.deadline:
                return None
            folder.mkdir(parents=True, exist_ok=True)
            saved = {**dataclasses.asdict(trial), "datasets": [str(path) for path in self.datasets]}
            (folder / TRIAL).write_text(json.dumps(saved, indent=1) + "\n")
            command = [sys.executable, "-m", "benchmarks.ablation.trial", str(folder)]
            with (folder / "log").open("a") as log:
                code = subprocess.run(
                    command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
                ).returncode
            if code:
                raise RuntimeError(f"a trial failed with exit {code}: see {folder / 'log'}")
        return dict(json.loads((folder / RESULT).read_text()))
