"""`hmoe finetune`: from a user's table to a predictor, with an honest estimate of how good it is."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_pipeline.errors import UsageError
from data_pipeline.molecules.rejects import rejects_in_words
from data_pipeline.redact import redacted
from data_pipeline.sources.streams import file_name
from hmoe_ds.downstream.claim import claimed
from hmoe_ds.downstream.fitting import Fit, FitOptions, fit
from hmoe_ds.downstream.inference import inference_device
from hmoe_ds.downstream.kept_fits import KeptFits
from hmoe_ds.downstream.labelled_table import Conflicts, LabelledTable, read_labelled_table
from hmoe_ds.downstream.out_files import check_outside
from hmoe_ds.downstream.predictor import Prediction, combine, save_predictor
from hmoe_ds.downstream.property_model import PropertyModel
from hmoe_ds.downstream.scores import PRIMARY, Array, Task, score, summary, without_nan
from hmoe_ds.downstream.splits import (
    SIDES,
    Rows,
    Split,
    balanced_scaffold_split,
    column_split,
    random_split,
    scaffold_split,
)
from hmoe_ds.downstream.worker_model import WorkerModel
from hmoe_ds.model.description import read_description
from hmoe_ds.model.hmoe import HMoEModel
from hmoe_ds.model.hub import find_model

PREDICTIONS = "predictions.csv"
WORK_FOLDER = ".hmoe_finetune"
# Lines on single targets of each side that are printed, at most.
_SHOWN_TARGETS = 20

Report = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class FinetuneOptions:
    """What to learn from a table, and how.

    Args:
        targets: columns of labels.
        task: what they are: 0 and 1, or quantities.
        smiles_column: column of SMILES; found by itself without it.
        id_column: column of identifiers; found by itself without it, or else the number of the row.
        split: how molecules are dealt to training, validation and test (`splits.py`).
        split_column: with `split` column, the one that says so.
        split_seed: of a split that is random.
        seeds: members of the ensemble, fitted with the seeds 0, 1, ...
        conflicts: what to do about rows of one molecule with different labels (`labelled_table.py`).
        standardize: learn from the standard form of molecules; None: as the model was trained.
        fit: how each member is fitted.
    """

    targets: tuple[str, ...]
    task: Task
    smiles_column: str | None = None
    id_column: str | None = None
    split: Literal["scaffold", "balanced-scaffold", "random", "column"] = "scaffold"
    split_column: str | None = None
    split_seed: int = 0
    seeds: int = 1
    conflicts: Conflicts = "error"
    standardize: bool | None = None
    fit: FitOptions = field(default_factory=FitOptions)

    def __post_init__(self) -> None:
        if not self.targets:
            raise UsageError("--target names no column: give one, or several with commas between them")
        columns = _columns(self.targets)
        twice = sorted({name for name in columns if columns.count(name) > 1})
        twice += [name for name in columns if name == "source"]  # of what `hmoe predict` writes
        if twice:
            raise UsageError(
                f"--target {','.join(self.targets)}: a table of predictions would have more than one column "
                f"{twice[0]!r}; rename a column"
            )
        if self.split_seed < 0:
            raise UsageError(f"--split-seed is {self.split_seed}: expected a number from 0")
        if self.task == "regression" and self.fit.class_weights:
            raise UsageError("--class-weights is for classes: leave it out, or give --task classification")
        if self.split in ("scaffold", "column") and self.split_seed:
            raise UsageError(
                f"--split {self.split} is the same whatever --split-seed: leave that out, or give --split "
                "balanced-scaffold or random"
            )
        if self.conflicts == "mean" and self.task == "classification":
            raise UsageError("--conflicts mean is for quantities: give error, keep or drop for classes")


def finetune(
    model: str | Path,
    table: str,
    out: str | Path,
    options: FinetuneOptions,
    report: Report = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Fine-tune and write a folder: the predictor (`predictor.py`), and `predictions.csv` with every row of the table.

    The test side takes no part in any decision: the epoch is chosen on validation.

    Args:
        model: folder made by `hmoe export`, or `owner/name` on the hub.
        table: CSV file with a header, Parquet, Arrow or SDF; or its URL.
        out: folder to write; it must be new or empty, or what the same command left when it was interrupted.
        options: what to learn, and how.
        report: called with (stage, units done, all units).

    Returns:
        Rows by side, scores on validation and test, the files written.

    Raises:
        ModelFormatError: no exported model at `model`.
        UsageError: the table cannot be learned from (`read_labelled_table`); the split leaves a side without labels;
            `out` holds something, or another command writes it.
        FitError: a fit diverges from the beginning.
    """
    out = Path(out)
    folder = find_model(model)
    check_outside(out, folder, f"--out {out}")
    described = read_description(folder)
    standardize = described.standardize if options.standardize is None else options.standardize
    found = read_labelled_table(
        table, options.targets, options.task, options.smiles_column, standardize, options.conflicts
    )
    ids, split = found.table.ids(options.id_column), split_table(found, options)
    with claimed(out), _unfinished(out) as work:
        kept = KeptFits(work, *_what_fits_are_of(folder, found, split, options))
        fits = [fit_member(folder, found, split, options, seed, kept, report) for seed in range(options.seeds)]
        outputs = [each.outputs(found.molecules) for each in fits]
        prediction = combine(options.task, outputs)
        sides = {side: rows for side, rows in zip(SIDES, split, strict=True) if side != "train" and len(rows)}
        result = {
            "rows": {"all": len(found.smiles), **{side: len(rows) for side, rows in zip(SIDES, split, strict=True)}},
            "left_out": _counts(found),
            "epochs": [each.best_epoch for each in fits],
            **{side: _scored(options, outputs, prediction, found.label_nT, rows) for side, rows in sides.items()},
        }
        _write_predictions(out / PREDICTIONS, ids, found, split, prediction, options)
        description = {
            "task": options.task, "targets": list(options.targets), "standardize": standardize,
            "model": redacted(str(model)), "table": file_name(table),
            "options": asdict(options), "result": result,
        }  # fmt: skip
        save_predictor(out, fits, description, described.training, frozen=options.fit.mode == "frozen")
    return {**without_nan(result), "out": str(out), "predictions": str(out / PREDICTIONS)}


@contextmanager
def _unfinished(out: Path) -> Iterator[Path]:
    """Make the folder `out` and one in it for fits, which goes at the end; both go if this fails without a fit."""
    work = out / WORK_FOLDER
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not work.is_dir())):
        raise UsageError(f"--out {out} holds something already: give a new folder")
    work.mkdir(parents=True, exist_ok=True)
    try:
        yield work
    except BaseException:
        if not any(work.iterdir()):
            work.rmdir()
            with suppress(OSError):  # not empty
                out.rmdir()
        raise
    shutil.rmtree(work)


def _what_fits_are_of(folder: Path, found: LabelledTable, split: Split, options: FinetuneOptions) -> list[object]:
    how = asdict(options)
    del how["id_column"]
    del how["seeds"]  # with more or fewer of them, those that are fitted stay what they are
    sides = [rows.tolist() for rows in split]
    return [WorkerModel.of(folder).files.identity, how, found.canonical, found.label_nT.tolist(), sides]


def split_table(found: LabelledTable, options: FinetuneOptions) -> Split:
    """The sides of the molecules of a table, by places among them.

    Raises:
        UsageError: training or validation has no labels, or one class of a target alone.
    """
    match options.split:
        case "scaffold":
            split = scaffold_split(found.canonical)
        case "balanced-scaffold":
            split = balanced_scaffold_split(found.canonical, options.split_seed)
        case "random":
            split = random_split(found.keys, options.split_seed)
        case "column":
            cells = found.table.column(options.split_column or "")
            rows = found.row_n.tolist()
            split = column_split([cells[row] for row in rows], options.split_column or "", rows, found.keys)
    for side, rows in zip(SIDES, split, strict=True):
        if side != "test":
            _check_side(side, found.label_nT[rows], options)
    return split


def _check_side(side: str, label_nT: Array, options: FinetuneOptions) -> None:
    mends = {"scaffold": "another --split", "column": "other sides in that column"}
    mend = f"give more molecules, or {mends.get(options.split, 'another --split-seed or --split')}"
    if not len(label_nT):
        raise UsageError(f"--split {options.split} leaves no molecule for {side}: {mend}")
    least = 2 if options.task == "classification" else 1
    values = [np.unique(label_n[~np.isnan(label_n)]) for label_n in label_nT.T]
    lacking = [name for name, found in zip(options.targets, values, strict=True) if len(found) < least]
    # A target that lacks a class in validation is fitted, and not counted in the score there.
    if len(lacking) == len(values) or (lacking and side == "train"):
        what = "only one class, or no label," if options.task == "classification" else "no label"
        raise UsageError(f"--split {options.split} leaves {what} of {lacking[0]!r} for {side}: {mend}")


def fit_member(
    model: str | Path,
    found: LabelledTable,
    split: Split,
    options: FinetuneOptions,
    seed: int,
    kept: KeptFits,
    report: Report = lambda stage, done, total: None,
) -> Fit:
    """Fit one member of the ensemble, from the exported model at `model`, unless it is kept already."""
    encoder, how = HMoEModel.from_pretrained(model), options.fit
    start = PropertyModel(encoder, len(options.targets), how.readout, how.dropout, seed).to(inference_device())
    known = kept.load(seed, start)
    if known is not None:
        return known
    stage = f"fit {seed + 1} of {options.seeds}"
    fitted = fit(
        start, found.molecules, found.label_nT, split, options.task, how, seed,
        lambda epoch: report(stage, epoch, how.most_epochs),
    )  # fmt: skip
    kept.save(seed, fitted)
    return fitted


def _counts(found: LabelledTable) -> dict[str, int]:
    reasons = list(found.reasons.values())
    return {reason: reasons.count(reason) for reason in sorted(set(reasons))}


def _scored(
    options: FinetuneOptions, outputs: Sequence[Array], prediction: Prediction, label_nT: Array, rows: Rows
) -> dict[str, Any]:
    """Scores of the ensemble on some molecules, and of its members alone."""
    task, primary = options.task, PRIMARY[options.task]
    alone = [score(task, output_nT[rows], label_nT[rows]).means[primary] for output_nT in outputs]
    of_all = summary(task, options.targets, prediction.mean_nT[rows], label_nT[rows])
    return {**of_all, f"{primary}_of_members": alone}


def _write_predictions(
    path: Path, ids: list[str], found: LabelledTable, split: Split, prediction: Prediction, options: FinetuneOptions
) -> None:
    """Every row of the table: its molecule's side, labels and predictions, or why it has none."""
    side_of = {int(place): side for side, places in zip(SIDES, split, strict=True) for place in places}
    place_of = {int(row): place for place, row in enumerate(found.row_n)}
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        columns = _columns(options.targets)
        writer.writerow(columns)
        for row, (name, smiles) in enumerate(zip(ids, found.smiles, strict=True)):
            place = place_of.get(row)
            if place is None:
                writer.writerow([row, name, smiles, *[""] * (len(columns) - 4), found.reasons[row]])
                continue
            cells = []
            for target in range(len(options.targets)):
                label = found.label_nT[place, target]
                numbers = prediction.mean_nT[place, target], prediction.deviation_nT[place, target]
                cells += ["" if np.isnan(label) else f"{label:.10g}"]
                cells += ["" if np.isnan(number) else f"{number:.6g}" for number in numbers]
            writer.writerow([row, name, smiles, side_of.get(place, ""), *cells, ""])


def _columns(targets: Sequence[str]) -> list[str]:
    """Of the table of predictions; `row` counts from 0, as elsewhere."""
    numbers = [name for target in targets for name in (target, f"{target}_predicted", f"{target}_deviation")]
    return ["row", "source_id", "smiles", "side", *numbers, "reason"]


def describe_result(result: dict[str, Any], options: FinetuneOptions) -> str:
    """What `finetune` gave, in words."""
    rows, primary = result["rows"], PRIMARY[options.task]
    lines = [f"{rows['all']} rows: " + ", ".join(f"{rows[side]} for {side}" for side in SIDES)]
    if result["left_out"]:
        lines.append(f"left out: {rejects_in_words(result['left_out'])}")
    for side in ("validation", "test"):
        if side not in result:
            continue
        scores = result[side]
        of_targets = list(scores["by_target"].items())
        by_target = [f"  {name}: {_score_words(each, primary)}" for name, each in of_targets[:_SHOWN_TARGETS]]
        if len(of_targets) > _SHOWN_TARGETS:
            by_target.append(f"  and {len(of_targets) - _SHOWN_TARGETS} more, in predictor.json")
        if len(of_targets) == 1:
            lines.append(f"{side}: {_score_words(scores, primary)}")
        elif options.task == "classification":
            counted = f"{scores['targets_counted']} of {scores['targets']} targets"
            lines += [f"{side}: {_score_words(scores, primary)}, mean of {counted}", *by_target]
        else:  # a mean of errors in different units would say nothing
            lines += [f"{side}:", *by_target]
    return "\n".join(
        [*lines, f"the predictor is in {result['out']}, what it says of the table in {result['predictions']}"]
    )


def _score_words(scores: Mapping[str, Any], primary: str) -> str:
    """Such as `roc_auc 0.812 (95% 0.751 to 0.863), 204 molecules`."""
    molecules = f"{scores['molecules']} molecules"
    if not scores["molecules"]:
        return "no labels there"
    if scores[primary] is None:
        return f"no {primary}: the labels of its {molecules} there are all of one class"
    low, high = scores[f"{primary}_95"]
    interval = "too few for an interval" if low is None else f"95% {low:.3f} to {high:.3f}"
    return f"{primary} {scores[primary]:.3f} ({interval}), {molecules}"
