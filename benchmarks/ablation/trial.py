"""One pretraining run of the ablation, in a folder of its own: `python -m benchmarks.ablation.trial FOLDER`.

FOLDER/trial.json says what to run, FOLDER/result.json what came of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.ablation.datasets import Datasets
from data_pipeline.schema import SPLITS
from hmoe_ds.config import RunConfig
from hmoe_ds.config_parser import load_config
from hmoe_ds.data.mixture import Mixture, open_mixture
from hmoe_ds.data.plan import BatchPlan
from hmoe_ds.downstream.export import export_checkpoint
from hmoe_ds.model.hmoe import HMoEModel
from hmoe_ds.moe.grouped import FLOP_FORMULAS
from hmoe_ds.objectives.total import PretrainingTask, count_normalizers
from hmoe_ds.training import loop
from hmoe_ds.training.feed import rank_slice
from hmoe_ds.training.validation import validate

Settings = Mapping[str, Any]
Figures = dict[str, float]

TRIAL, RESULT = "trial.json", "result.json"


@dataclass(frozen=True)
class Trial:
    """One run.

    Args:
        settings: fields of the configuration, beside those of the whole ablation.
        seed: of the run.
        steps: optimizer steps.
        reported: also look at the report set.
    """

    settings: Settings
    seed: int
    steps: int
    reported: bool

    @property
    def name(self) -> str:
        """The same for the same trial, another one for any other."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def words(settings: Settings, datasets: Datasets) -> list[str]:
    """The command line of a run with `settings`."""
    options = [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in settings.items()]
    return ["--config", "tiny_cpu", f"--data.path={datasets.main}", "--run.mlflow=false", *options]


def training_flops(settings: Settings, datasets: Datasets) -> float:
    """FLOPs of one optimizer step, counted by torch on the first slice of the plan."""
    config = load_config(words(settings, datasets))
    training = _open(config, SPLITS[0])
    plan = BatchPlan(training, config.data, config.optim.accumulation, config.run.seed)
    views = config.objective.contrast_bare_scaffold
    part = rank_slice(training, plan.next_step()[0], config.objective.mask_ratio, 0, 0, 1, views)
    model = HMoEModel(config.model, config.router, heads=config.objective.molecule_heads)
    task = PretrainingTask(model, config.objective)
    with FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as counter:
        losses, _ = task(part, count_normalizers([part], "cpu"))
        losses.total.backward()
    return float(counter.get_total_flops())


def run_trial(folder: Path, trial: Trial, datasets: Datasets) -> Figures:
    """Train, and gather the figures of the last step and of the report set."""
    run = folder / "run"
    every = ["--run.log_every=20", f"--run.steps={trial.steps}", f"--run.seed={trial.seed}", f"--run.out={run}"]
    argv = words(trial.settings, datasets) + every
    loop.main(argv)
    lines = [_numbers(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = ("validation_", "probe_")
    figures = {name.replace("validation_", "tune_"): lines[-1][name] for name in lines[-1] if name.startswith(kept)}
    figures["molecules_per_second"] = median(line["molecules_per_second"] for line in lines[1:])
    # Means over the second half: one line is one batch.
    late = lines[len(lines) // 2 :]
    for name in ("chosen_p", "expert_load_max_over_mean", "routed_over_dense_rms"):
        figures[f"train_{name}"] = sum(line[name] for line in late) / len(late)
    if trial.reported:
        figures |= _report(load_config(argv), run, datasets.report)
    shutil.rmtree(run / "checkpoints")
    return figures


def _numbers(line: str) -> Figures:
    """A line of metrics; what was no finite number is infinite, so that a run that diverged is the worst."""
    return {name: math.inf if value is None else value for name, value in json.loads(line).items()}


def _report(config: RunConfig, run: Path, dataset: Path) -> Figures:
    """Losses and routing health of the exported model on the report set."""
    export_checkpoint(run, run / "model")
    task = PretrainingTask(HMoEModel.from_pretrained(run / "model"), config.objective)
    data = dataclasses.replace(config.data, path=str(dataset))
    found = validate(task, _open(dataclasses.replace(config, data=data), SPLITS[1]), config, rank=0, ranks=1)
    return {name.replace("validation_", "report_"): value for name, value in found.items()}


def _open(config: RunConfig, split: str) -> Mixture:
    return open_mixture(config.data, split, targets=config.objective.needs_targets)


def main() -> None:
    folder = Path(sys.argv[1])
    saved = json.loads((folder / TRIAL).read_text())
    datasets = Datasets(*(Path(path) for path in saved.pop("datasets")))
    torch.set_num_threads(1)
    figures = run_trial(folder, Trial(**saved), datasets)
    temporary = folder / (RESULT + ".tmp")
    temporary.write_text(json.dumps(figures, indent=1) + "\n")
    os.replace(temporary, folder / RESULT)


if __name__ == "__main__":
    main()
