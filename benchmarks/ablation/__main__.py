"""What each part of H-MoE is worth: a search, a table of arms, a scaling curve.

    python -m benchmarks.ablation zinc.smi.gz chembl.tsv.gz --out runs/ablation \
        --table '{path: bbbp.csv, label: p_np}' --table '{path: esol.csv, label: logSolubility}'

Prepares three sets with no scaffold in common (train, tune, report), searches on the tune set, then trains the arms of
the table and of the scaling curve with equal training FLOPs and looks at the report set once per arm and seed. One run
is one process with one thread; `--workers` of them run at a time. What has run is not run again, so the command goes on
where it was stopped; with `--minutes` it stops by itself. Prints tables and one JSON line, and writes the line to
docs/results/ablation.json, also when parts are missing. `--earlier` takes such a file, of runs whose folders are gone:
what it answers is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml
from scipy.stats import t as student

from benchmarks.ablation.arms import curve_arms, table_arms
from benchmarks.ablation.bench import Bench, OutOfTimeError
from benchmarks.ablation.datasets import make_datasets
from benchmarks.ablation.search import BASE, FLAT, Search, find_arms
from benchmarks.ablation.trial import Figures, Settings, training_flops
from benchmarks.result import write_result

COLUMNS = {
    "report_loss": "loss",
    "report_consistency": "consistency",
    "report_group_entropy": "entropy",
    "report_chosen_p": "chosen p",
    "report_group_scaffold_nmi": "NMI",
    "report_expert_load_max_over_mean": "load",
    "molecules_per_second": "molecules/s",
}


def summary(runs: Sequence[Figures], others: Mapping[str, Sequence[Figures]]) -> dict[str, Any]:
    """Means of all figures, spread of the loss, and its differences to other arms, seed by seed."""
    found: dict[str, Any] = {name: mean(run[name] for run in runs) for name in runs[0]}
    losses = [run["report_loss"] for run in runs]
    found["report_loss_seeds"] = losses
    if len(runs) > 1:
        found["report_loss_spread"] = stdev(losses)
        for name, against in others.items():
            differences = [loss - other["report_loss"] for loss, other in zip(losses, against, strict=True)]
            found[f"against {name}"] = mean(differences)
            # Half the 95% confidence interval of the mean difference: a smaller one cannot be told from none.
            half = student.ppf(0.975, len(runs) - 1) * stdev(differences) / math.sqrt(len(runs))
            found[f"detectable against {name}"] = half
    return found


def measure_table(bench: Bench, arms: Mapping[str, Settings], steps: int, seeds: int) -> dict[str, Any]:
    """Every arm with `seeds` seeds; raises OutOfTimeError."""
    trials = [bench.trial(arms[name], seed, steps, reported=True) for seed in range(seeds) for name in arms]
    figures = bench.run(trials)
    runs = {name: figures[place :: len(arms)] for place, name in enumerate(arms)}
    found = {name: summary(runs[name], {other: runs[other] for other in ("flat", "H-MoE")}) for name in arms}
    for place, name in enumerate(arms):
        trial = trials[place]
        settings = {field: value for field, value in trial.settings.items() if field != "probe.tables"}
        found[name] |= {"settings": settings, "steps": trial.steps}
    return found


def _answers(table: dict[str, Any], arms: Mapping[str, Settings], seeds: int) -> bool:
    """Whether a table of an earlier run has all these arms with so many seeds."""
    return all(name in table and len(table[name]["report_loss_seeds"]) >= seeds for name in arms)


def show(table: dict[str, Any]) -> None:
    """Print a table of arms."""
    probes = [name for name in table["flat"] if name.startswith("probe_")]
    titles = COLUMNS | {name: name.removeprefix("probe_") for name in probes}
    heads = "".join(f"{'against ' + other:>20}" for other in ("flat", "H-MoE"))
    print(f"{'arm':<32}" + heads + "".join(f"{title:>13}" for title in titles.values()))
    for name, found in table.items():
        print(f"{name:<32}" + _differences(found) + "".join(f"{found[key]:>13.4f}" for key in titles))


def _differences(found: dict[str, Any]) -> str:
    if "against flat" not in found:
        return " " * 40
    pairs = [(found[f"against {other}"], found[f"detectable against {other}"]) for other in ("flat", "H-MoE")]
    return "".join(f"{f'{difference:+.4f} +- {half:.4f}':>20}" for difference, half in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", help="molecule files")
    parser.add_argument("--out", type=Path, required=True, help="folder for datasets and runs")
    parser.add_argument("--table", action="append", default=[], help="labelled molecules, as in probe.tables")
    parser.add_argument("--steps", type=int, default=600, help="of the flat arm, at budget 1")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budgets", type=int, nargs="+", default=[1, 3, 10], help="of the scaling curve")
    parser.add_argument("--scaling-seeds", type=int, default=1)
    parser.add_argument("--earlier", type=Path, help="results of an earlier run with the same --steps and sources")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after this time")
    options = parser.parse_args()
    tables = [yaml.safe_load(table) for table in options.table]
    deadline = time.time() + 60 * options.minutes
    labelled = [table["path"] for table in tables]
    datasets = make_datasets(options.sources, labelled, options.out, options.workers)
    base = {**BASE, "probe.tables": tables}
    step_flops = training_flops({**base, **FLAT}, datasets)
    bench = Bench(options.out / "trials", datasets, base, step_flops, options.workers, deadline)
    earlier = json.loads(options.earlier.read_text()) if options.earlier else {"steps": options.steps}
    if earlier["steps"] != options.steps:
        parser.error(f"--earlier {options.earlier} is of --steps {earlier['steps']}, not {options.steps}")
    result: dict[str, Any] = {"name": "ablation", "ratio": None, "target": 1.0, "steps": options.steps}
    search = Search(bench, options.steps, earlier.get("search", {}))
    try:
        arms = find_arms(search)
        result["table"] = earlier.get("table", {})
        if not _answers(result["table"], table_arms(arms), options.seeds):
            result["table"] = measure_table(bench, table_arms(arms), options.steps, options.seeds)
        show(result["table"])
        result["scaling"] = dict(earlier.get("scaling", {}))
        for budget in options.budgets:
            at_budget, asked = result["scaling"].get(str(budget), {}), curve_arms(arms)
            if not _answers(at_budget, asked, options.scaling_seeds):
                at_budget = measure_table(bench, asked, budget * options.steps, options.scaling_seeds)
            result["scaling"][str(budget)] = at_budget
            print(f"\n{budget} times the molecules")
            show(at_budget)
            result["ratio"] = at_budget["flat"]["report_loss"] / at_budget["H-MoE"]["report_loss"]
    except OutOfTimeError as left:
        print(f"stopped: {left}; run the same command again")
    finally:
        result["search"] = search.answers
        write_result(result)


if __name__ == "__main__":
    main()
