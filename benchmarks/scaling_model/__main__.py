"""Step times on paper, checked where they can be: on 1, 2 and 4 ranks of this machine.

    python -m benchmarks.scaling_model --data data/zinc --out runs/scaling

First makes small runs of pretraining (one rank alone; one on each core at once; several layouts of 1, 2 and 4 ranks),
measures gloo's collectives and the planning of batches, and prints what the first runs and those speeds predict for the
layouts beside what their steps took. Then
prints, for the large presets on clusters of GPUs, what the same model says with the numbers of `--help`: paper
numbers, nothing of it was measured. Prints one JSON line, which goes to docs/results/scaling_model.json; its "ratio"
is predicted over measured in the cell that is furthest from 1. Runs that are in `--out` already are not run again.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from benchmarks.result import write_result
from benchmarks.scaling_model.fabric import Cluster
from benchmarks.scaling_model.machine import Machine, measure_machine, measured_worlds
from benchmarks.scaling_model.paper import PRESETS, Row, Scaling, paper_rows, paper_table
from benchmarks.scaling_model.step import Gpu
from benchmarks.scaling_model.validation import (
    LAYOUTS,
    Cell,
    validate,
    validation_table,
    validation_worlds,
    worst_ratio,
)
from benchmarks.scaling_model.worlds import make_runs
from data_pipeline.manifest import Manifest
from hmoe_ds.training.dry_run import MeanMolecule

# What the results tell of this machine, beside the speeds of its collectives.
_MACHINE = ("cores", "alone", "beside", "seconds_per_parameter", "planned_per_second")
_SCALINGS: tuple[Scaling, ...] = ("weak", "strong")


def small_run(options: argparse.Namespace) -> list[str]:
    """Overrides of the runs here: groups by lot, as a gate that has not learned yet sends all atoms to one rank."""
    width, large = options.width, 1 << 20
    return [
        *("--config=tiny_cpu", f"--data.path={options.data}", f"--data.atoms_per_step={large}"),
        *(f"--data.bonds_per_step={large}", "--data.validation_molecules=32", "--router.group_choice=random"),
        *(f"--model.hidden_size={width}", f"--model.dense_size={3 * width}", f"--router.expert_size={width}"),
        *(f"--router.shared_size={width}", f"--run.steps={options.steps}", "--run.log_every=1", "--run.mlflow=false"),
    ]


def mean_molecule(data: Path) -> MeanMolecule:
    """Of the training molecules of a dataset."""
    split = Manifest.load(data).splits["train"]
    return MeanMolecule(split.atoms / split.rows, split.bonds / split.rows, f"mean of {data}")


def check_here(options: argparse.Namespace) -> tuple[Machine, list[Cell]]:
    """Run, measure this machine, predict."""
    base, molecule = small_run(options), mean_molecule(options.data)
    sizes = [options.molecules // 4, options.molecules // 2]
    words = [*base, f"--data.molecules_per_step={options.molecules}"]
    make_runs([*measured_worlds(base, sizes, options.out), *validation_worlds(words, options.out)])
    machine = measure_machine(base, sizes, molecule.atoms, options.out)
    return machine, [validate(layout, words, molecule, machine, options.out) for layout in LAYOUTS]


def on_paper(options: argparse.Namespace, planned_per_second: float) -> list[Row]:
    """The tables of the large presets, printed; hosts plan as fast as this machine's cores."""
    gpu = Gpu(
        options.mfu * options.peak_tflops * 1e12,
        options.launch_us * 1e-6,
        options.launches_per_block,
        options.update_bytes / (options.memory_gbps * 1e9),
        planned_per_second,
    )
    cluster = Cluster(
        options.gpus_per_node,
        options.node_gbps * 1e9,
        options.network_gbps * 1e9,
        options.node_latency_us * 1e-6,
        options.network_latency_us * 1e-6,
    )
    rows: list[Row] = []
    for preset in PRESETS:
        for scaling in _SCALINGS:
            found = list(
                paper_rows(preset, scaling, options.gpus, options.ep_sizes, options.migration_share, gpu, cluster)
            )
            print(f"\n{preset}, {scaling} scaling (on paper; ms per step)\n{paper_table(found)}")
            rows += found
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    here = parser.add_argument_group("the check here")
    here.add_argument("--data", type=Path, required=True, help="dataset made by hmoe prepare")
    here.add_argument("--out", type=Path, required=True, help="folder for the runs")
    here.add_argument("--width", type=int, default=128, help="hidden width of the small model (128)")
    here.add_argument("--molecules", type=int, default=128, help="molecules of a step, all ranks together (128)")
    here.add_argument("--steps", type=int, default=15, help="steps of each run (15)")
    paper = parser.add_argument_group("the cluster on paper: H100 of 80 GB, 8 in a node, assumed")
    paper.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512, 1024])
    paper.add_argument("--ep-sizes", type=int, nargs="+", default=[8, 16], help="inside a node, across nodes (8 16)")
    paper.add_argument(
        "--migration-share",
        type=float,
        nargs="+",
        default=[0.1, 0.5],
        help="bytes with migration over those without: 0.05 to 0.15 with one group per molecule, up to half with two",
    )
    paper.add_argument("--peak-tflops", type=float, default=989.0, help="dense bf16 (989)")
    paper.add_argument("--mfu", type=float, default=0.25, help="achieved share of the peak in a large slice (0.25)")
    paper.add_argument("--launch-us", type=float, default=5.0, help="microseconds of a kernel launch (5)")
    paper.add_argument("--launches-per-block", type=int, default=170, help="forward and backward (170)")
    paper.add_argument("--memory-gbps", type=float, default=2000.0, help="achieved GB/s of GPU memory (2000)")
    paper.add_argument("--update-bytes", type=float, default=32.0, help="bytes AdamW moves per parameter (32)")
    paper.add_argument("--gpus-per-node", type=int, default=8)
    paper.add_argument("--node-gbps", type=float, default=450.0, help="GB/s of a GPU inside a node (450)")
    paper.add_argument("--network-gbps", type=float, default=50.0, help="GB/s of a GPU between nodes (50)")
    paper.add_argument("--node-latency-us", type=float, default=3.0)
    paper.add_argument("--network-latency-us", type=float, default=8.0)
    return parser.parse_args()


def main() -> None:
    options = parse()
    machine, cells = check_here(options)
    print(validation_table(cells))
    rows = on_paper(options, machine.planned_per_second)
    ratio = worst_ratio(cells)
    result: dict[str, Any] = {
        "name": "scaling_model",
        "ratio": ratio,
        "target": 1.0,
        "worst_error": math.exp(abs(math.log(ratio))) - 1,
        "options": {name: value for name, value in vars(options).items() if name not in ("data", "out")},
        "machine": {
            **{name: getattr(machine, name) for name in _MACHINE},
            "speeds": [
                {"run": ranks, "kind": kind, "ranks": size, **speed._asdict()}
                for ranks, fabric in machine.fabrics.items()
                for (kind, size), speed in fabric.speeds.items()
            ],
        },
        "cells": [cell.figures() for cell in cells],
        "paper": [row.figures() for row in rows],
    }
    write_result(result)


if __name__ == "__main__":
    main()
