"""Real ranks: bytes and seconds of steps with and without migration, `python -m benchmarks.migration.ranks JOB`.

Started by `measure`, once for each rank. Every step of the plan is done twice by one engine, with and without
migration, in turns, so both have the same molecules. The learning rate is 0 and biases stay, so both have the same
routing too; otherwise a step does what a step of `hmoe pretrain` does.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from hmoe_ds.config import RunConfig
from hmoe_ds.config_parser import load_config
from hmoe_ds.data.mixture import open_mixture
from hmoe_ds.data.plan import BatchPlan
from hmoe_ds.model.hmoe import HMoEModel
from hmoe_ds.moe.balance import measure_load
from hmoe_ds.moe.exchange import Traffic
from hmoe_ds.objectives.total import RankSlice, count_normalizers
from hmoe_ds.training.engine import build_engine, init_distributed, loss_scale
from hmoe_ds.training.feed import rank_slice
from hmoe_ds.training.recording.metrics import StepTotals

ARMS = ("without", "with")


@dataclass(frozen=True)
class Job:
    """What the ranks do.

    Args:
        words: command line of the run, with `parallel.ep_size` and `parallel.migration`.
        model: folder of the exported model that they start from.
        steps: steps that are counted; one before them is not.
        out: file of what they find.
    """

    words: list[str]
    model: str
    steps: int
    out: str


@dataclass(frozen=True)
class Found:
    """Of each arm, `ARMS`.

    Args:
        sent: bytes of each step.
        seconds: median duration of a step.
        load: most atoms that a rank has in a step, over the mean; mean of the steps.
    """

    sent: dict[str, list[int]]
    seconds: dict[str, float]
    load: dict[str, float]


def measure(job: Job, ranks: int) -> Found:
    """Start the ranks on this machine, with one thread each, and wait for them.

    Raises:
        CalledProcessError: one of them failed.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "benchmarks.migration.ranks", json.dumps(dataclasses.asdict(job))]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"})
    return Found(**json.loads(Path(job.out).read_text()))


def run_rank(job: Job) -> None:
    """What each rank does; rank 0 writes what they found."""
    rank, ranks = init_distributed()
    config = load_config(job.words)
    traffic = Traffic()
    engine = build_engine(config, traffic)
    load_weights(engine, HMoEModel.from_pretrained(job.model), rank)
    encoder = engine.module.model.encoder
    migrations = dict(zip(ARMS, (None, encoder.migration), strict=True))
    mixture = open_mixture(config.data, "train", targets=config.objective.needs_targets)
    plan = BatchPlan(mixture, config.data, config.optim.accumulation, config.run.seed)
    steps: dict[str, list[tuple[int, float, float]]] = {arm: [] for arm in ARMS}
    for number in range(job.steps + 1):
        slices = [
            rank_slice(mixture, whole, config.objective.mask_ratio, config.run.seed, rank, ranks)
            for whole in plan.next_step()
        ]
        for arm in ARMS if number % 2 else reversed(ARMS):
            encoder.migration = migrations[arm]
            steps[arm].append(do_step(engine, config, slices, traffic))
    if rank == 0:
        columns = {arm: list(zip(*counted[1:], strict=True)) for arm, counted in steps.items()}
        found = Found(
            sent={arm: list(sent) for arm, (sent, _, _) in columns.items()},
            seconds={arm: median(seconds) for arm, (_, seconds, _) in columns.items()},
            load={arm: sum(load) / len(load) for arm, (_, _, load) in columns.items()},
        )
        Path(job.out).write_text(json.dumps(dataclasses.asdict(found)))


def do_step(engine: Any, config: RunConfig, slices: list[RankSlice], traffic: Traffic) -> tuple[int, float, float]:
    """One optimizer step of all ranks; -> bytes that they sent for experts, seconds, atoms of a rank max/mean."""
    torch.distributed.barrier()
    started = time.perf_counter()
    norm = count_normalizers(slices, engine.device)
    totals, atoms = StepTotals(traffic), 0
    for part in slices:
        losses, encoding = engine(part, norm)
        engine.backward(losses.total * loss_scale(config))
        engine.step()
        atoms += encoding.batch.num_atoms
        totals.add(losses, measure_load(encoding.scaffold, encoding.atoms, part.batch.molecule_N, config.router))
    sent = int(totals.reduce().exchanged_bytes)
    seconds = time.perf_counter() - started
    atoms_R = [torch.zeros(1) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(atoms_R, torch.tensor([float(atoms)]))
    return sent, seconds, float(max(atoms_R) / sum(atoms_R) * len(atoms_R))


@torch.no_grad()
def load_weights(engine: Any, exported: HMoEModel, rank: int) -> None:
    """Give the engine's model the weights of an exported one: all that ranks share, and this rank's experts."""
    weights, ranks = exported.state_dict(), torch.distributed.get_world_size()
    for name, value in engine.module.model.state_dict(keep_vars=True).items():
        is_expert = not getattr(value, "allreduce", True)
        value.data.copy_(weights[name].chunk(ranks)[rank] if is_expert else weights[name])
    engine.optimizer.refresh_fp32_params()  # else the next update would bring back what it began with


if __name__ == "__main__":
    run_rank(Job(**json.loads(sys.argv[1])))
