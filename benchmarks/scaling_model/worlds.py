"""Small runs of pretraining on this machine: which ranks make which, and when."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class World:
    """Ranks that pretrain together.

    Args:
        ranks: how many.
        runs: command lines of `hmoe pretrain`, without `--num_ranks`, by the folder of the run.
        core: that the ranks keep to; any without it.
    """

    ranks: int
    runs: dict[str, list[str]]
    core: int | None = None


def environment(**more: str) -> dict[str, str]:
    """Of ranks on this machine: one thread each, no GPU, and huge pages, as `hmoe pretrain` has them on a CPU."""
    here = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "THP_MEM_ALLOC_ENABLE": "1"}
    return {**os.environ, **here, **more}


def make_runs(stages: Sequence[Sequence[World]]) -> None:
    """Make runs, stage after stage; the worlds of a stage go on at the same time. What is there is not made again."""
    left = [[_left(world) for world in stage] for stage in stages]
    command = [sys.executable, "-m", "benchmarks.scaling_model.ranks", json.dumps(left)]
    subprocess.run(command, check=True, env=environment(), stdout=subprocess.DEVNULL)


def _left(world: World) -> dict[str, object]:
    """As plain data, without the runs that are there."""
    runs = {folder: words for folder, words in world.runs.items() if not (Path(folder) / "metrics.jsonl").exists()}
    return dataclasses.asdict(dataclasses.replace(world, runs=runs))
