"""How fast a training step is, the data included: ours against a peer's, on the same molecules and one core.

    THP_MEM_ALLOC_ENABLE=1 python -m benchmarks.peer_step --data data/zinc

Arms, in turns, each with a model of 5 message passing layers of width 300 and batches of 256 molecules:

* `peer`: a GIN under attribute masking (`peer_gin.py`), Adam, a PyG `DataLoader` over a list of `Data` in memory.
* `encoder`: ours with feed-forwards of width 1, the smallest that the configuration allows, and one H-MoE layer of one
  expert: message passing of the width and depth of the peer and little else. Its MLPs are 300-300-300, not 300-600-300.
* `equal_flops`: 4 dense blocks and an H-MoE block, with feed-forwards of a size that gives them the peer's FLOPs.
* `hmoe`: 2 dense and 3 H-MoE blocks, feed-forwards three times as wide as the states, as in the presets.

Ours read mapped shards through the plan and the prefetcher, hide 20% of atoms and bonds and have all losses of a run,
AdamW, a clipped gradient and the figures of the log, but no engine. All is on one core, the prefetcher's thread too.
The variable makes torch ask for huge pages, for all arms, as `hmoe pretrain` does on a CPU.
FLOPs are counted by torch on a few steps of each arm. Prints molecules/s, the medians of the rounds, by wall-clock, and
one JSON line, which goes to docs/results/peer_step.json; there also ratios of CPU time, for a machine with other work.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import cycle
from statistics import median
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader

from benchmarks.peer_gin import GIN, MaskAtom, peer_molecule
from benchmarks.result import write_result
from hmoe_ds.config import RunConfig
from hmoe_ds.config_parser import load_config
from hmoe_ds.data.batch import gather
from hmoe_ds.data.mixture import open_mixture
from hmoe_ds.data.plan import BatchPlan
from hmoe_ds.model.hmoe import HMoEModel
from hmoe_ds.moe.balance import measure_load
from hmoe_ds.moe.exchange import Traffic
from hmoe_ds.moe.grouped import FLOP_FORMULAS
from hmoe_ds.objectives.total import PretrainingTask, count_normalizers
from hmoe_ds.training.prefetch import Prefetcher
from hmoe_ds.training.recording.metrics import StepTotals

TARGET = 1.5
PEER, ENCODER = "peer", "encoder"
# What both models have; the target is for the arm that has little else.
_WIDTH = ["--model.hidden_size=300", "--router.gate_size=32"]
_EXPERTS = ["--router.groups=4", "--router.experts=16", "--router.experts_per_atom=2"]
OURS = {
    ENCODER: [
        *("--model.lower_blocks=4", "--model.upper_blocks=1", "--model.dense_size=1", "--router.groups=1"),
        *("--router.experts=1", "--router.experts_per_atom=1", "--router.expert_size=1", "--router.shared_size=0"),
    ],
    "equal_flops": [
        *("--model.lower_blocks=4", "--model.upper_blocks=1", "--model.dense_size=176"),
        *(*_EXPERTS, "--router.expert_size=64", "--router.shared_size=64"),
    ],
    "hmoe": [
        *("--model.lower_blocks=2", "--model.upper_blocks=3", "--model.dense_size=900"),
        *(*_EXPERTS, "--router.expert_size=300", "--router.shared_size=300"),
    ],
}

# Makes one training step, its data included; -> molecules in it.
Step = Callable[[], int]


def our_config(arm: str, path: str, batch: int) -> RunConfig:
    """The run of one of our arms."""
    large = 1 << 30
    data = [f"--data.path={path}", f"--data.molecules_per_step={batch}", "--data.window_shards=4"]
    data += [f"--data.atoms_per_step={large}", f"--data.bonds_per_step={large}"]
    return load_config([*_WIDTH, *OURS[arm], *data, f"--run.steps={large}"])


def our_steps(config: RunConfig, ahead: Prefetcher) -> Step:
    """Steps as the training loop makes them, without an engine."""
    task = PretrainingTask(HMoEModel(config.model, config.router), config.objective)
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-3, fused=True)

    def step() -> int:
        slices, stage, _ = ahead.step()
        norm, totals = count_normalizers(slices, "cpu"), StepTotals(Traffic())
        for part in slices:
            losses, encoding = task(part, norm, stage.routing)
            losses.total.backward()
            load = measure_load(encoding.scaffold, encoding.atoms, part.batch.molecule_N, config.router)
            totals.add(losses, load)
        totals.reduce()
        nn.utils.clip_grad_norm_(task.parameters(), config.optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return sum(part.batch.num_molecules for part in slices)

    return step


class Masked(torch.utils.data.Dataset[Data]):
    """Molecules in memory, of which atoms are hidden anew each time."""

    def __init__(self, molecules: list[Data]) -> None:
        self._molecules, self._transform = molecules, MaskAtom()

    def __len__(self) -> int:
        return len(self._molecules)

    def __getitem__(self, index: int) -> Data:
        return self._transform(self._molecules[index])


def peer_steps(molecules: list[Data], batch: int) -> Step:
    """The peer's steps; its epochs are over these molecules."""
    model = GIN()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loader = DataLoader(Masked(molecules), batch_size=batch, shuffle=True)
    batches = (loaded for _ in cycle([None]) for loaded in loader)

    def step() -> int:
        loaded = next(batches)
        model(loaded).backward()
        optimizer.step()
        optimizer.zero_grad()
        return int(loaded.num_graphs)

    return step


def same_molecules(config: RunConfig, steps: int) -> Iterator[Data]:
    """The molecules of our first steps, as the peer has them."""
    mixture = open_mixture(config.data, "train")
    plan = BatchPlan(mixture, config.data, 1, config.run.seed)
    for _ in range(steps):
        for part in plan.next_step():
            yield from map(peer_molecule, gather(mixture, part.rows_B).to_pyg().to_data_list())


def flops_per_molecule(step: Step, steps: int) -> float:
    """FLOPs per molecule in some steps, by torch's counter."""
    with FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as counter:
        molecules = sum(step() for _ in range(steps))
    return counter.get_total_flops() / molecules


class Rate(NamedTuple):
    """Molecules per second."""

    wall_clock: float
    cpu_time: float


def rate(step: Step, steps: int) -> Rate:
    """That of some steps."""
    started = time.perf_counter(), time.process_time()
    molecules = sum(step() for _ in range(steps))
    return Rate(molecules / (time.perf_counter() - started[0]), molecules / (time.process_time() - started[1]))


def medians(rates: list[Rate]) -> Rate:
    """Of each figure."""
    return Rate(*(median(column) for column in zip(*rates, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="dataset made by hmoe prepare")
    parser.add_argument("--batch", type=int, default=256, help="molecules of a batch")
    parser.add_argument("--steps", type=int, default=2, help="steps of an arm in a round")
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    configs = {arm: our_config(arm, options.data, options.batch) for arm in OURS}
    all_steps = 1 + options.steps * (1 + options.rounds)
    rates: dict[str, list[Rate]] = {PEER: [], **{arm: [] for arm in OURS}}
    with ExitStack() as stack:
        arms = {PEER: peer_steps(list(same_molecules(configs[ENCODER], all_steps)), options.batch)}
        for arm, config in configs.items():
            mixture = open_mixture(config.data, "train")
            plan = BatchPlan(mixture, config.data, 1, config.run.seed)
            ahead = stack.enter_context(Prefetcher(mixture, plan, config, 0, rank=0, ranks=1))
            arms[arm] = our_steps(config, ahead)
        for step in arms.values():
            step()  # compiles, and makes the state of the optimizer
        flops = {arm: flops_per_molecule(step, options.steps) for arm, step in arms.items()}
        for _ in range(options.rounds):
            for arm, step in arms.items():
                rates[arm].append(rate(step, options.steps))
    found = {arm: medians(values) for arm, values in rates.items()}
    ratios, cpu_ratios = ({arm: found[arm][kind] / found[PEER][kind] for arm in OURS} for kind in (0, 1))
    for arm, value in found.items():
        print(f"{arm:<14}{value.wall_clock:>8,.0f} molecules/s{flops[arm] / 1e6:>9,.0f} MFLOP/molecule")
    write_result(
        {
            "name": "peer_step",
            "ratio": ratios[ENCODER],
            "target": TARGET,
            "ratios": ratios,
            "cpu_time_ratios": cpu_ratios,
            "molecules_per_second": {arm: value.wall_clock for arm, value in found.items()},
            "molecules_per_cpu_second": {arm: value.cpu_time for arm, value in found.items()},
            "flops_per_molecule": flops,
            "huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
            "batch": options.batch,
            "rounds": options.rounds,
            "steps": options.steps,
        }
    )


if __name__ == "__main__":
    main()
