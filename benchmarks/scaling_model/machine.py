"""What the model must know of this machine: costs of one rank alone and beside others, speeds of gloo."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.scaling_model.collectives import Kind
from benchmarks.scaling_model.fabric import Measured, Speed, fit_speed
from benchmarks.scaling_model.speeds import update_seconds_per_parameter
from benchmarks.scaling_model.step import Core
from benchmarks.scaling_model.worlds import World, environment
from hmoe_ds.config import RunConfig
from hmoe_ds.config_parser import load_config
from hmoe_ds.data.mixture import open_mixture
from hmoe_ds.data.plan import BatchPlan
from hmoe_ds.model.size import count_parameters
from hmoe_ds.objectives.contrast import count_anchors
from hmoe_ds.training.feed import rank_slice
from hmoe_ds.training.launching.node import free_port

# Steps at the start of a run that are not like the others.
_WARM_UP = 3


@dataclass(frozen=True)
class Machine:
    """This machine's figures.

    Args:
        cores: CPU cores.
        alone: fixed seconds and seconds per atom of one rank that has the machine for itself.
        beside: the same of one rank on one core when every core has one.
        seconds_per_parameter: of the optimizer.
        fabrics: gloo, by the number of ranks of a run.
        planned_per_second: molecules of a large global batch that one core plans and deals per second.
    """

    cores: int
    alone: tuple[float, float]
    beside: tuple[float, float]
    seconds_per_parameter: float
    fabrics: dict[int, Measured]
    planned_per_second: float

    def core(self, ranks: int) -> Core:
        """What each of `ranks` ranks computes with."""
        fixed, per_atom = self.alone if ranks == 1 else self.beside
        return Core(fixed, per_atom, self.seconds_per_parameter, max(1.0, ranks / self.cores))

    def fabric(self, ranks: int) -> Measured:
        """What connects `ranks` ranks; one needs nothing."""
        return self.fabrics.get(ranks, Measured({}))


def step_seconds(folder: Path) -> float:
    """Median duration of a step of the run in `folder`, which logged every step; without the first ones."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return median(line["molecules"] / line["molecules_per_second"] for line in lines[_WARM_UP:])


def measured_worlds(base: Sequence[str], sizes: Sequence[int], out: Path) -> tuple[list[World], list[World]]:
    """The runs that tell what one rank costs: one that is alone; one on each core, at the same time.

    Args:
        base: overrides of the run, without its folder and its batch.
        sizes: molecules per step, at least two different ones.
        out: folder for the runs.
    """

    def world(name: str, core: int | None = None) -> World:
        runs = {str(out / name / f"{size}_molecules"): [*base, f"--data.molecules_per_step={size}"] for size in sizes}
        return World(1, runs, core)

    return [world("alone")], [world(f"core{core}", core) for core in range(os.cpu_count() or 1)]


def measure_machine(base: Sequence[str], sizes: Sequence[int], atoms: float, out: Path) -> Machine:
    """What one rank costs alone and beside others, by the runs of `measured_worlds`, and the collectives of 2 and 4.

    Args:
        base, sizes, out: as of `measured_worlds`, whose runs are there.
        atoms: mean atoms of a molecule.
    """
    per_parameter = update_seconds_per_parameter()
    config = load_config(base)
    update = per_parameter * count_parameters(config.model, config.router, config.objective.molecule_heads).total
    alone, beside = (
        _without_update(_fit_steps([Path(folder) for world in worlds for folder in world.runs], sizes, atoms), update)
        for worlds in measured_worlds(base, sizes, out)
    )
    fabrics = {ranks: measure_fabric(ranks) for ranks in (2, 4)}
    return Machine(os.cpu_count() or 1, alone, beside, per_parameter, fabrics, planned_per_second(config))


def _without_update(line: tuple[float, float], update: float) -> tuple[float, float]:
    """Fixed seconds and seconds per atom, without the optimizer's part of the fixed ones."""
    return max(0.0, line[0] - update), line[1]


def planned_per_second(config: RunConfig, molecules: int = 1 << 17, ranks: int = 1024) -> float:
    """Molecules/s of a global batch that one core plans, deals to `ranks` ranks and looks through for anchors.

    Args:
        config: of a run, with its dataset.
        molecules: of a batch.
        ranks: so many that gathering the molecules of one of them costs next to nothing.
    """
    large = 1 << 40
    data = dataclasses.replace(
        config.data, molecules_per_step=molecules, atoms_per_step=large, bonds_per_step=large, window_shards=4
    )
    mixture = open_mixture(data, "train")
    plan = BatchPlan(mixture, data, accumulation=1, seed=0)
    rates = []
    for _ in range(4):  # the first opens shards and compiles
        started = time.process_time()  # other work on the machine does not count
        (whole,) = plan.next_step()
        part = rank_slice(mixture, whole, config.objective.mask_ratio, 0, rank=0, ranks=ranks)
        count_anchors(part.scaffold_key_B.numpy())
        rates.append(len(whole.rows_B) / (time.process_time() - started))
    return median(rates[1:])


def _fit_steps(folders: Sequence[Path], sizes: Sequence[int], atoms: float) -> tuple[float, float]:
    """Fixed seconds of a step, and seconds per atom, of runs whose molecules per step are `sizes` in turn."""
    line = fit_speed([size * atoms for _, size in zip(folders, cycle(sizes))], [step_seconds(one) for one in folders])
    return line.latency, 1 / line.bandwidth


def measure_fabric(ranks: int) -> Measured:
    """Speeds of gloo's collectives in groups of a run of `ranks` ranks."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "speeds.json"
        meeting = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        command = [sys.executable, "-m", "benchmarks.scaling_model.speeds", str(file)]
        _wait([subprocess.Popen(command, env=environment(**meeting, RANK=str(rank))) for rank in range(ranks)])
        return measured_fabric(json.loads(file.read_text()))


def measured_fabric(found: list[dict[str, Any]]) -> Measured:
    """The lines that `speeds` wrote."""
    speeds: dict[tuple[Kind, int], Speed] = {
        (one["kind"], one["ranks"]): Speed(one["latency"], one["bandwidth"]) for one in found
    }
    return Measured(speeds)


def _wait(processes: list[subprocess.Popen[bytes]]) -> None:
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(f"a rank failed: exit codes {codes}")
