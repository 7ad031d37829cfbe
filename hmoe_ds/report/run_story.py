"""What a run has written down about itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import UsageError
from hmoe_ds.config import RunConfig
from hmoe_ds.config_parser import load_config
from hmoe_ds.run_files import ALLOCATION, CONFIG, LOAD, METRICS, whole_lines

Line = dict[str, Any]
_MOST_LOADS = 500  # as many as a figure can show


class ExpertLoad(NamedTuple):
    """Loads over time, at S steps.

    Attributes:
        step_S: the steps.
        molecules_SG: molecules whose top group is g.
        atoms_SLE: atoms that chose expert e of H-MoE layer l.
    """

    step_S: NDArray[np.int64]
    molecules_SG: NDArray[np.int64]
    atoms_SLE: NDArray[np.int64]


class RunStory(NamedTuple):
    """A run, as its folder tells it.

    Attributes:
        folder: of the run.
        config: its configuration.
        lines: of `metrics.jsonl`, by step.
        load: None for runs that did not write it down.
        splits: of experts, as in `allocation.jsonl`.
    """

    folder: Path
    config: RunConfig
    lines: list[Line]
    load: ExpertLoad | None
    splits: list[Line]

    @property
    def has_groups(self) -> bool:
        """Whether the scaffold level of the gate has a say."""
        return self.config.router.groups > 1 and self.config.router.form != "flat"

    def series(self, name: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Steps and values of a figure, where it was measured and is finite."""
        found = [(line["step"], line[name]) for line in self.lines if line.get(name) is not None]
        steps, values = zip(*found, strict=True) if found else ((), ())
        return np.array(steps, np.int64), np.array(values, np.float64)

    def last(self, name: str) -> float | None:
        """The last value of a figure, if there is one."""
        values = self.series(name)[1]
        return float(values[-1]) if len(values) else None


def read_run(folder: str | Path) -> RunStory:
    """Read a run's folder; a run that goes on, or was killed, is as good as a finished one.

    Raises:
        UsageError: no run there, or one without a single logged step.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise UsageError(f"{folder} is no run's folder: expected one that holds {CONFIG}, as hmoe pretrain makes it")
    lines = _read_lines(folder / METRICS)
    if not lines:
        raise UsageError(f"{folder} has no logged step in {METRICS}: report on a run that has done one")
    config = load_config(["--config", str(folder / CONFIG)])
    return RunStory(folder, config, lines, _read_load(folder / LOAD), _read_lines(folder / ALLOCATION))


def _read_load(path: Path) -> ExpertLoad | None:
    lines = _read_lines(path, most=_MOST_LOADS)
    if not lines:
        return None
    columns = [np.array([line[name] for line in lines], np.int64) for name in ("step", "molecules_G", "atoms_LE")]
    return ExpertLoad(*columns)


def _read_lines(path: Path, most: int | None = None) -> list[Line]:
    """The whole lines of a file, or `most` of them, evenly spread."""
    lines = list(whole_lines(path))
    if most is not None:
        lines = [lines[place] for place in np.linspace(0, len(lines) - 1, min(most, len(lines))).astype(int)]
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise UsageError(f"{path} is damaged ({error}): copy it again") from error
