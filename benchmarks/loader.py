"""How fast batches are made: ours from mapped shards, against PyG's loaders, in the order of the plan, on one core.

    python -m benchmarks.loader --data data/zinc

Arms, in turns, each over the same molecules in batches of the same size: `BatchPlan` and `gather` (ours; opening the
dataset and the plan are in it), a PyG `DataLoader` over a list of `Data` that is in memory, and the first pass of one
over an `InMemoryDataset`, which cuts each molecule out of its large tensors. `Data` holds what our batches hold. Prints
molecules/s of each, the medians of the rounds, and one JSON line, which goes to docs/results/loader.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from torch_geometric.data import Data, InMemoryDataset
from torch_geometric.loader import DataLoader

from benchmarks.result import write_result
from hmoe_ds.config import DataConfig
from hmoe_ds.data.batch import gather
from hmoe_ds.data.mixture import Mixture, open_mixture
from hmoe_ds.data.plan import BatchPlan

# What PyG's loaders are to be beaten by: over a list, and over an InMemoryDataset.
TARGETS = {"list": 20.0, "in_memory": 60.0}


class InMemory(InMemoryDataset):
    """Molecules as PyG keeps a dataset in memory."""

    def __init__(self, molecules: list[Data]) -> None:
        super().__init__()
        self.data, self.slices = self.collate(molecules)


def ours(data: DataConfig, batches: int) -> int:
    """Make `batches` batches of the plan; -> molecules."""
    mixture = open_mixture(data, "train")
    plan = BatchPlan(mixture, data, accumulation=1, seed=0)
    return sum(gather(mixture, part.rows_B).num_molecules for _ in range(batches) for part in plan.next_step())


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="dataset made by hmoe prepare")
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--batch", type=int, default=256, help="molecules of a batch")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    large = 1 << 30
    data = DataConfig(
        path=options.data, molecules_per_step=options.batch, atoms_per_step=large, bonds_per_step=large, window_shards=4
    )
    mixture = open_mixture(data, "train")
    rows = plan_rows(mixture, data, options.batches)  # also compiles what the plan and the gathering need
    molecules, sizes = list(to_data(mixture, rows)), [len(part) for part in rows]
    rates: dict[str, list[float]] = {"ours": [], "list": [], "in_memory": []}
    for _ in range(options.rounds):
        fresh = InMemory(molecules)  # after a pass it keeps what it cut out
        rates["ours"].append(rate(lambda: ours(data, options.batches)))
        rates["list"].append(rate(lambda: pyg(molecules, sizes)))
        rates["in_memory"].append(rate(partial(pyg, fresh, sizes)))
    found = {name: median(values) for name, values in rates.items()}
    ratios = {name: found["ours"] / found[name] for name in TARGETS}
    for name, value in found.items():
        print(f"{name:<12}{value:>14,.0f} molecules/s")
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
        }
    )


if __name__ == "__main__":
    main()
