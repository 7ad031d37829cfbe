"""`hmoe evaluate`: pretrained models against a random forest and no pretraining, on the same splits in one run.

Results go into one JSON file cell by cell (set, arm, seed); what is there is not computed again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.durable import replace_text
from data_pipeline.errors import UsageError
from data_pipeline.keys import file_checksum
from hmoe_ds.downstream.baselines import forest_predictions
from hmoe_ds.downstream.claim import claimed
from hmoe_ds.downstream.fitting import FitOptions, fit
from hmoe_ds.downstream.inference import inference_device
from hmoe_ds.downstream.moleculenet import BenchmarkSet, files_of_sets, read_set
from hmoe_ds.downstream.property_model import PropertyModel
from hmoe_ds.downstream.scores import PRIMARY, Array, score, without_nan
from hmoe_ds.downstream.splits import SIDES
from hmoe_ds.downstream.worker_model import WorkerModel
from hmoe_ds.model.description import read_description
from hmoe_ds.model.hmoe import HMoEModel

FOREST, UNTRAINED, PRETRAINED = "forest_ecfp", "no_pretraining", "pretrained"
_METRICS = {"classification": "ROC-AUC, %", "regression": "RMSE"}
_FIRST_COLUMNS = ("set", "metric")
_TABLE_BEGINS = f"| {' | '.join(_FIRST_COLUMNS)} |"

_SPLIT_NOTE = "The split, as that of published results, is by the molecules as they are written."

# Fields of `FitOptions` that were not there yet, and what fits did then.
_YOUNGER = {"readout": "mean", "head_epochs": 0}

Report = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class EvaluateOptions:
    """What to evaluate, and how models are fine-tuned.

    Args:
        sets: names of sets; without any all that are there.
        seeds: fits of each arm, with the seeds 0, 1, ...
        others: further pretrained models by the names of their arms, such as a dense one.
        standardize: learn from the standard form of molecules; None: as the first model was trained.
        fit: of all models alike.
    """

    sets: tuple[str, ...] = ()
    seeds: int = 3
    others: Mapping[str, str] = field(default_factory=dict)
    standardize: bool | None = None
    fit: FitOptions = field(default_factory=FitOptions)


class Arm(NamedTuple):
    """One way to predict.

    Attributes:
        name: in results.
        predict: of a set and a seed: predictions of all its molecules, [n, T], and what is to be noted of the fit.
    """

    name: str
    predict: Callable[[BenchmarkSet, int], tuple[Array, dict[str, Any]]]


def evaluate(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    options: EvaluateOptions,
    report: Report = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Fill `out` with the test scores of all arms on all sets, and write a table of them beside it, as Markdown.

    Test labels take no part in any fit: each takes the epoch that is best on validation.

    Args:
        model: folder made by `hmoe export`, or `owner/name` on the hub.
        data: folder of the sets' files (`moleculenet.TASKS`).
        out: JSON file; one of the same data, options and models is continued, and gets arms that it has not.
        options: what to evaluate.
        report: called with (stage, cells done, all cells).

    Returns:
        What is in the file.

    Raises:
        ModelFormatError: no exported model there.
        UsageError: no such sets; a set that cannot be read or split; `out` holds results of something else, or another
            command writes it.
        FitError: a fit diverges from the beginning.
    """
    out = Path(out)
    if out.suffix != ".json":
        raise UsageError(f"--out {out}: expected a file whose name ends with .json")
    _check_table(out)
    taken = [name for name in options.others if name in (FOREST, UNTRAINED, PRETRAINED)]
    if taken:
        raise UsageError(f"--arm {taken[0]}: that is the name of another arm; give this one a name of its own")
    chosen = files_of_sets(Path(data), options.sets)
    models = {
        PRETRAINED: WorkerModel.of(model),
        **{name: WorkerModel.of(each) for name, each in options.others.items()},
    }
    standardize = models[PRETRAINED].standardize if options.standardize is None else options.standardize
    arms = list(_arms(models, options.fit))
    settings = _settings(models, options.fit, standardize)
    with claimed(out):
        results = _Results(out, settings)
        total, done = len(chosen) * len(arms) * options.seeds, 0
        for name, path in chosen.items():
            results.begin(name, file_checksum(path))
            wanted = [(arm, seed) for arm in arms for seed in range(options.seeds)]
            cells = [(arm, seed) for arm, seed in wanted if not results.has(name, arm.name, seed)]
            done += len(wanted) - len(cells)
            if not cells:
                continue
            benchmark = read_set(name, path, standardize)
            results.describe(name, _describe(benchmark))
            for arm, seed in cells:
                report("evaluate", done, total)
                predicted_nT, notes = arm.predict(benchmark, seed)
                results.add(name, arm.name, seed, {**_scores(benchmark, predicted_nT), **notes})
                done += 1
        report("evaluate", total, total)
        table = results_table(results.content)
        replace_text(out.with_suffix(".md"), table + "\n")
    return {**results.content, "out": str(out), "table": table}


def _check_table(out: Path) -> None:
    """Raise UsageError if there is something else where the table is to be."""
    table = out.with_suffix(".md")
    if table.exists() and not table.read_text(errors="replace").startswith(_TABLE_BEGINS):
        raise UsageError(
            f"--out {out}: {table}, which its table would replace, is of something else: give another name"
        )


def results_table(content: Mapping[str, Any]) -> str:
    """Test scores as Markdown: mean and standard deviation over seeds, ROC-AUC in percent, and RMSE.

    `targets` are those with both classes in the test set, of all. An arm has a mean over sets when it has them all.
    """
    arms = [FOREST, UNTRAINED, *content["settings"]["models"]]
    head = [*_FIRST_COLUMNS, "train / validation / test / unreadable", "targets", *arms]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    means: dict[str, list[list[float]]] = {"classification": [], "regression": []}
    most = max((len(cells) for entry in content["sets"].values() for cells in entry["arms"].values()), default=0)
    for name, entry in content["sets"].items():
        factor = 100 if entry["task"] == "classification" else 1
        cells, row = [], []
        for arm in arms:
            cells_of_arm = entry["arms"].get(arm, {}).values()
            values = [factor * cell["test"] for cell in cells_of_arm if cell["test"] is not None]
            row.append(float(np.mean(values)) if values else float("nan"))
            digits = 1 if factor == 100 else 3
            fewer = f" ({len(values)} of {most} seeds)" if len(values) < most else ""
            cells.append(f"{row[-1]:.{digits}f} ± {np.std(values):.{digits}f}{fewer}" if values else "")
        means[entry["task"]].append(row)
        counted = {cell["targets_counted"]["test"] for arm in entry["arms"].values() for cell in arm.values()}
        counts = [" / ".join(map(str, entry["rows"].values())), f"{max(counted)} of {entry['targets']}"]
        lines.append("| " + " | ".join([name, _METRICS[entry["task"]], *counts, *cells]) + " |")
    for task, digits in (("classification", 1), ("regression", 3)):
        if len(means[task]) > 1:
            shown = ["" if np.isnan(value) else f"{value:.{digits}f}" for value in np.mean(means[task], axis=0)]
            lines.append(f"| mean of {len(means[task])} | {_METRICS[task]} | | | {' | '.join(shown)} |")
    shared = {name: entry.get("test_scaffolds_in_training") for name, entry in content["sets"].items()}
    if any(shared.values()):
        told = ", ".join(f"{count} of {name}" for name, count in shared.items() if count)
        lines += ["", f"Test molecules whose scaffold, as it is learned from, training has too: {told}. {_SPLIT_NOTE}"]
    return "\n".join(lines)


def _arms(models: Mapping[str, WorkerModel], options: FitOptions) -> Iterator[Arm]:
    yield Arm(FOREST, _forest)
    described = read_description(Path(models[PRETRAINED].files.folder))
    yield Arm(
        UNTRAINED,
        lambda benchmark, seed: _fine_tuned(
            HMoEModel(described.model, described.router, seed=seed, heads=None), benchmark, options, seed
        ),
    )
    for name, model in models.items():
        yield Arm(name, _pretrained(model, options))


def _pretrained(model: WorkerModel, options: FitOptions) -> Callable[[BenchmarkSet, int], tuple[Array, dict[str, Any]]]:
    return lambda benchmark, seed: _fine_tuned(HMoEModel.from_pretrained(model.files.folder), benchmark, options, seed)


def _forest(benchmark: BenchmarkSet, seed: int) -> tuple[Array, dict[str, Any]]:
    labels = (benchmark.label_nT, benchmark.split.train, benchmark.task)
    return forest_predictions(benchmark.fingerprint_nV, *labels, seed), {}


def _fine_tuned(
    encoder: HMoEModel, benchmark: BenchmarkSet, options: FitOptions, seed: int
) -> tuple[Array, dict[str, Any]]:
    start = PropertyModel(encoder, len(benchmark.targets), options.readout, options.dropout, seed)
    fitted = fit(
        start.to(inference_device()), benchmark.molecules, benchmark.label_nT, benchmark.split, benchmark.task,
        options, seed,
    )  # fmt: skip
    return fitted.outputs(benchmark.molecules), {"best_epoch": fitted.best_epoch, "epochs": len(fitted.validation)}


def _scores(benchmark: BenchmarkSet, predicted_nT: Array) -> dict[str, Any]:
    scored = {
        side: score(benchmark.task, predicted_nT[rows], benchmark.label_nT[rows])
        for side, rows in (("validation", benchmark.split.validation), ("test", benchmark.split.test))
    }
    primary = PRIMARY[benchmark.task]
    return {
        **{side: each.means[primary] for side, each in scored.items()},
        "test_metrics": scored["test"].means,
        "targets_counted": {side: each.counted for side, each in scored.items()},
    }


def _describe(benchmark: BenchmarkSet) -> dict[str, Any]:
    sizes = {side: len(rows) for side, rows in zip(SIDES, benchmark.split, strict=True)}
    return {
        "task": benchmark.task,
        "targets": len(benchmark.targets),
        "rows": {**sizes, "unreadable": benchmark.unreadable},
        "test_scaffolds_in_training": benchmark.shared_scaffolds,
    }


def _settings(models: Mapping[str, WorkerModel], options: FitOptions, standardize: bool) -> dict[str, Any]:
    """What decides a cell, besides its set and seed."""
    identities = {name: model.files.contents for name, model in models.items()}
    return {"models": identities, "fit": asdict(options), "standardize": standardize}


class _Results:
    """The JSON file, written after each cell."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path = path
        self.content: dict[str, Any] = {"suite": "moleculenet", "settings": settings, "sets": {}}
        if not path.exists():
            return
        try:
            found = json.loads(path.read_text())
            before = dict(found["settings"])
            models = dict(before["models"])
            before["fit"] = _YOUNGER | before["fit"]
            if not isinstance(found["sets"], dict):
                raise TypeError("sets")
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"--out {path} is no results file of hmoe evaluate: give another file") from error
        # A file may have further arms, and gets those that it has not.
        before["models"] = {name: models.get(name, model) for name, model in settings["models"].items()}
        differs = [name for name in settings if before.get(name) != settings[name]]
        if differs:
            raise UsageError(
                f"--out {path} holds results of other {' and '.join(differs)}: give another file, or remove it"
            )
        found["settings"] = {**settings, "models": models | settings["models"]}
        self.content = found

    def begin(self, name: str, checksum: str) -> None:
        """The set `name` is next; raises UsageError when the file has results of another set of that name."""
        entry = self.content["sets"].setdefault(name, {"blake2b": checksum, "arms": {}})
        if entry["blake2b"] != checksum:
            raise UsageError(f"--out {self._path} holds results of another {name}: give another file, or remove it")

    def describe(self, name: str, description: dict[str, Any]) -> None:
        """Note what the set is."""
        self.content["sets"][name] |= description

    def has(self, name: str, arm: str, seed: int) -> bool:
        """Whether the cell is done."""
        return str(seed) in self.content["sets"][name]["arms"].get(arm, {})

    def add(self, name: str, arm: str, seed: int, cell: dict[str, Any]) -> None:
        """Keep a cell."""
        self.content["sets"][name]["arms"].setdefault(arm, {})[str(seed)] = without_nan(cell)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(self._path, json.dumps(self.content, indent=1) + "\n")
