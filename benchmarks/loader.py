"""How fast batches are made: ours from mapped shards, against PyG's loaders, in the order of the plan, on one core.

    python -m benchmarks.loader --data data/zinc

Arms, in turns, in batches of the same size: `BatchPlan` and `gather` over a whole epoch, once the first (ours, first:
opening the dataset, the checksums of its shards and the plan are in it) and once a later one (ours: they are behind
it); and over the first batches of an epoch a PyG `DataLoader` over a list of `Data` that is in memory, and the first
pass of one over an `InMemoryDataset`, which cuts each molecule out of its large tensors. `Data` holds what our batches
hold, features as int64, as users of PyG have them. The list, which is ready, is compared with a later epoch, the first
pass with the first one. At the start the first epoch is also timed after the system was told to forget the shards.

Then for each preset: how long one core takes to make a rank's part of a step (plan, deal, gather, masks), beside how
long the step itself takes a GPU that computes `--gpu-tera-flops`. Prints molecules/s, medians of the rounds, and one
JSON line, which goes to docs/results/loader.json.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch_geometric.data import Data, InMemoryDataset
from torch_geometric.loader import DataLoader

from benchmarks.preset_gpus import PRESET_GPUS
from benchmarks.result import write_result
from hmoe_ds.config import DataConfig
from hmoe_ds.config_parser import load_config, preset_names
from hmoe_ds.data.batch import gather
from hmoe_ds.data.mixture import Mixture, open_mixture
from hmoe_ds.data.plan import BatchPlan
from hmoe_ds.model.size import flops_per_molecule
from hmoe_ds.training.feed import rank_slice

# What PyG's loaders are to be beaten by: over a list, and over an InMemoryDataset; and by which epoch of ours.
TARGETS = {"list": 20.0, "in_memory": 60.0}
COMPARED = {"list": "ours", "in_memory": "ours, first"}


class InMemory(InMemoryDataset):
    """Molecules as PyG keeps a dataset in memory."""

    def __init__(self, molecules: list[Data]) -> None:
        super().__init__()
        self.data, self.slices = self.collate(molecules)


def first_epoch(data: DataConfig) -> int:
    """Open a dataset and make the batches of an epoch; -> molecules."""
    mixture = open_mixture(data, "train")
    return next_epoch(mixture, BatchPlan(mixture, data, accumulation=1, seed=0), data)


def next_epoch(mixture: Mixture, plan: BatchPlan, data: DataConfig) -> int:
    """Make as many batches as an epoch has; -> molecules."""
    batches = len(mixture) // data.molecules_per_step
    return sum(gather(mixture, part.rows_B).num_molecules for _ in range(batches) for part in plan.next_step())


def forget_shards(folder: str) -> None:
    """Tell the system to drop the shards of a dataset, which nothing has mapped, from the page cache."""
    for shard in Path(folder).glob("*/*.arrow"):
        file = os.open(shard, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def plan_rows(mixture: Mixture, data: DataConfig, batches: int) -> list[np.ndarray]:
    """Rows of the plan's first batches."""
    plan = BatchPlan(mixture, data, accumulation=1, seed=0)
    return [part.rows_B for _ in range(batches) for part in plan.next_step()]


def pyg(molecules: Any, sizes: list[int]) -> int:
    """Load molecules in batches of these sizes; -> molecules."""
    starts = np.cumsum([0, *sizes])
    batches = [list(range(first, first + size)) for first, size in zip(starts, sizes, strict=False)]
    return sum(batch.num_graphs for batch in DataLoader(molecules, batch_sampler=batches))


def rate(load: Callable[[], int]) -> float:
    """Molecules/s of one pass."""
    started = time.perf_counter()
    return load() / (time.perf_counter() - started)


def to_data(mixture: Mixture, rows: list[np.ndarray]) -> Iterator[Data]:
    """The molecules of these batches as PyG has them."""
    for part in rows:
        batch = gather(mixture, part)
        masks = batch.scaffold_mask_N.split(batch.ptr_B.diff().tolist())
        for number, molecule in enumerate(batch.to_pyg().to_data_list()):
            molecule.scaffold_mask = masks[number]
            molecule.scaffold_key = batch.scaffold_key_B[number].view(1)
            molecule.generic_key = batch.generic_key_B[number].view(1)
            molecule.mol_key = batch.mol_key_B2[number].view(1, 2)
            yield molecule


# What a CPU core achieves in a step of the preset for CPUs.
CPU_FLOPS = 50e9


def preset_step(preset: str, path: str, gpu_flops: float, steps: int = 5) -> dict[str, float]:
    """Seconds that a core takes to make one rank's part of a step, and seconds that the rank takes for it."""
    config, ranks = load_config(["--config", preset, f"--data.path={path}"]), PRESET_GPUS.get(preset, 1)
    rank_flops = gpu_flops if preset in PRESET_GPUS else CPU_FLOPS
    mixture = open_mixture(config.data, "train")
    plan = BatchPlan(mixture, config.data, config.optim.accumulation, seed=0)
    ratio, molecules, taken = config.objective.mask_ratio, 0, []
    for _ in range(1 + steps):  # the first one opens shards
        started = time.perf_counter()
        parts = [rank_slice(mixture, whole, ratio, seed=0, rank=0, ranks=ranks) for whole in plan.next_step()]
        taken.append(time.perf_counter() - started)
        molecules = sum(sum(part.counts) for part in parts)
    train = mixture.stores[0].manifest.splits["train"]
    flops = flops_per_molecule(config, train.atoms / train.rows, train.bonds / train.rows)
    made, computed = median(taken[1:]), flops.total * molecules / ranks / rank_flops
    return {"ranks": ranks, "molecules": molecules, "made": made, "computed": computed, "share": made / computed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="dataset made by hmoe prepare")
    parser.add_argument("--batches", type=int, default=100, help="that PyG's loaders make")
    parser.add_argument("--batch", type=int, default=256, help="molecules of a batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--gpu-tera-flops", type=float, default=400.0, help="10^12 FLOP/s that a GPU of a preset achieves"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    large = 1 << 30
    data = DataConfig(
        path=options.data, molecules_per_step=options.batch, atoms_per_step=large, bonds_per_step=large, window_shards=4
    )
    first_epoch(data)  # compiles what the plan and the gathering need
    gc.collect()  # what is mapped would not be forgotten
    forget_shards(options.data)
    cold = rate(partial(first_epoch, data))
    mixture = open_mixture(data, "train")
    rows = plan_rows(mixture, data, options.batches)
    molecules, sizes = list(to_data(mixture, rows)), [len(part) for part in rows]
    plan = BatchPlan(mixture, data, accumulation=1, seed=0)
    next_epoch(mixture, plan, data)
    rates: dict[str, list[float]] = {"ours": [], "ours, first": [], "list": [], "in_memory": []}
    for _ in range(options.rounds):
        fresh = InMemory(molecules)  # after a pass it keeps what it cut out
        rates["ours, first"].append(rate(partial(first_epoch, data)))
        rates["ours"].append(rate(partial(next_epoch, mixture, plan, data)))
        rates["list"].append(rate(lambda: pyg(molecules, sizes)))
        rates["in_memory"].append(rate(partial(pyg, fresh, sizes)))
    found = {name: median(values) for name, values in rates.items()}
    ratios = {name: found[arm] / found[name] for name, arm in COMPARED.items()}
    found["ours, cold"] = cold
    for name, value in found.items():
        print(f"{name:<12}{value:>14,.0f} molecules/s")
    presets = {name: preset_step(name, options.data, 1e12 * options.gpu_tera_flops) for name in preset_names()}
    print(f"{'preset':<16}{'ranks':>7}{'molecules':>11}{'made in':>10}{'computed in':>13}{'share':>9}")
    for name, step in presets.items():
        seconds = f"{step['made']:>9.4f}s{step['computed']:>12.4f}s{step['share']:>9.2f}"
        print(f"{name:<16}{step['ranks']:>7}{step['molecules']:>11}{seconds}")
    write_result(
        {
            "name": "loader",
            "ratio": ratios["list"],
            "target": TARGETS["list"],
            "ratios": ratios,
            "targets": TARGETS,
            "molecules_per_second": found,
            "shards": mixture.stores[0].num_shards,
            "batch": options.batch,
            "gpu_tera_flops": options.gpu_tera_flops,
            "presets": presets,
        }
    )


if __name__ == "__main__":
    main()
