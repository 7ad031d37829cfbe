"""What keeps the scaffold gate alive: pretraining with and without contrast and group balance.

    python -m benchmarks.gate_arms --data data/zinc --out runs/gate_arms

Runs `hmoe pretrain --config tiny_cpu` on two expert-parallel ranks for each of four arms, prints a table and one
JSON line, and writes the line to docs/results/gate_arms.json. An arm that has run is not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.result import write_result

ARMS = {
    "neither": ["--objective.contrast_weight=0", "--router.group_balance_rate=0"],
    "balance only": ["--objective.contrast_weight=0"],
    "contrast only": ["--router.group_balance_rate=0"],
    "both": [],
}
COLUMNS = {
    "validation_loss": "loss",
    "validation_consistency": "consistency",
    "validation_group_entropy": "group entropy",
    "validation_chosen_p": "chosen p",
    "validation_expert_load_max_over_mean": "expert load max/mean",
}


def run_arm(name: str, data: str, out: Path, steps: int, seed: int) -> dict[str, float]:
    """Train one arm and return its first and last training losses and its last validation."""
    folder = out / f"{name.replace(' ', '_')}_{steps}_steps_seed{seed}"
    command = [sys.executable, "-m", "hmoe_ds.cli", "pretrain", "--config", "tiny_cpu", "--num_ranks", "2"]
    command += ["--parallel.ep_size=2", f"--data.path={data}", f"--run.out={folder}", f"--run.steps={steps}"]
    command += [f"--run.seed={seed}", "--run.mlflow=false", *ARMS[name]]
    subprocess.run(command, check=True)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    speed = sorted(line["molecules_per_second"] for line in lines[1:])
    return {
        **{name: value for name, value in lines[-1].items() if name.startswith("validation_")},
        "first_loss": lines[0]["loss"],
        "last_loss": lines[-1]["loss"],
        "first_loss_atom": lines[0]["loss_atom"],
        "last_loss_atom": lines[-1]["loss_atom"],
        "molecules_per_second": speed[len(speed) // 2],
    }


def trade(figures: dict[str, float]) -> float:
    """One number for consistency and entropy together: their product, 0 for a collapsed or a random gate."""
    return figures["validation_consistency"] * figures["validation_group_entropy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="dataset made by hmoe prepare")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds per arm")
    options = parser.parse_args()
    arms: dict[str, list[dict[str, float]]] = {name: [] for name in ARMS}
    for seed in range(options.seeds):
        for name in ARMS:
            arms[name].append(run_arm(name, options.data, options.out, options.steps, seed))
    mean = {name: {key: sum(run[key] for run in runs) / len(runs) for key in runs[0]} for name, runs in arms.items()}
    print(f"{'arm':<14}" + "".join(f"{title:>22}" for title in COLUMNS.values()))
    for name, figures in mean.items():
        print(f"{name:<14}" + "".join(f"{figures[key]:>22.4f}" for key in COLUMNS))
    others = max(trade(figures) for name, figures in mean.items() if name != "both")
    result: dict[str, Any] = {
        "name": "gate_arms",
        "ratio": trade(mean["both"]) / others if others > 0 else None,
        "target": 1.0,
        "steps": options.steps,
        "seeds": options.seeds,
        "arms": mean,
    }
    write_result(result)


if __name__ == "__main__":
    main()
