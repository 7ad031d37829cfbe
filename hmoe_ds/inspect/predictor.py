"""A fine-tuned predictor: what it predicts, how good it is, what it was made from."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from data_pipeline.molecules.rejects import rejects_in_words
from hmoe_ds.downstream.predictor_record import DESCRIPTION, HEAD, read_predictor
from hmoe_ds.inspect.model import weights_of
from hmoe_ds.inspect.model_size import architecture, parameters, parameters_fact
from hmoe_ds.inspect.noted import noted, read_notes
from hmoe_ds.inspect.report import Report, fact, number, plural
from hmoe_ds.inspect.trained import trained_facts
from hmoe_ds.inspect.weights_header import read_header
from hmoe_ds.model.description import CONFIG, ModelFormatError, read_description

_INTERVAL, _OF_MEMBERS, _BY_TARGET = "_95", "_of_members", "by_target"
_SHOWN_TARGETS = 8
# Of a side's scores those that are no metric.
_COUNTS = ("molecules", "targets", "targets_counted")


def inspect_predictor(path: Path, verify: bool) -> Report:
    """What there is to know of a folder that `hmoe finetune` made.

    Args:
        path: the folder.
        verify: asks for checksums, which a predictor has none of; the text says so.

    Raises:
        PredictorError: no predictor there, or one that this version cannot read.
        ModelFormatError: the same of its first encoder.
        UsageError: what it notes makes no sense.
    """
    record, file = read_predictor(path), path / DESCRIPTION
    encoder = path / record["members"][0]["encoder"]
    described = read_description(encoder)
    notes, problems = read_notes(described.training, encoder / CONFIG), _problems(path, record)
    options, result = (noted(record, name, dict, file) or {} for name in ("options", "result"))
    fit = noted(options, "fit", dict, file) or {}
    figures: dict[str, Any] = {
        "path": str(path),
        "task": record["task"],
        "targets": record["targets"],
        "standardize": record["standardize"],
        "members": len(record["members"]),
        "mode": noted(fit, "mode", str, file),
        "readout": record["readout"],
        "split": noted(options, "split", str, file),
        "rows": _counts(result, "rows", file),
        "left_out": _counts(result, "left_out", file),
        "scores": {side: _scores(result, side, file) for side in ("validation", "test") if side in result},
        "model": noted(record, "model", str, file),
        "table": noted(record, "table", str, file),
        "architecture": architecture(described.model, described.router),
        "parameters": parameters(described.model, described.router, None),
        "trained": {**notes._asdict(), "sources": [source._asdict() for source in notes.sources]},
        "problems": problems,
        "predict": f"hmoe predict {shlex.quote(str(path))} molecules.csv --out predictions.csv",
    }
    form = "brought into their standard form first" if record["standardize"] else "as they are written"
    whole = "; ".join(problems) or f"heads and encoders of {plural(figures['members'], 'member')} are there"
    lines = [
        fact("predictor", f"{path}: {record['task']} of {_targets(record['targets'])}"),
        *(line for side, scores in figures["scores"].items() for line in _score_facts(side, scores, record["task"])),
        fact("split", f"{figures['split'] or 'not noted'}: {_sides(figures)}"),
        fact("table", figures["table"] or "not noted"),
        fact("fit", _fit(figures)),
        fact("input", f"molecules, {form}"),
        fact("encoder", figures["architecture"]),
        parameters_fact(figures["parameters"]),
        fact("pretrained", figures["model"] or "not noted"),
        *trained_facts(notes),
        fact("files", whole + ("; a predictor has no checksums to verify" if verify else "")),
        fact("to predict", figures["predict"]),
    ]
    return Report("predictor", "\n".join(lines), figures, problems)


def _problems(path: Path, record: Mapping[str, Any]) -> list[str]:
    """Files of members that are missing or damaged."""
    problems = []
    for name in sorted({member["encoder"] for member in record["members"]}):
        try:
            problems += weights_of(path / name, read_description(path / name))[1]
        except ModelFormatError as error:
            problems.append(str(error))
    for member in record["members"]:
        head = path / member["head"] / HEAD
        try:
            read_header(head)
        except FileNotFoundError:
            problems.append(f"{head} is missing: fine-tune again")
        except SafetensorError as error:
            problems.append(f"{head} is damaged ({error}): fine-tune again")
    return problems


def _counts(result: Mapping[str, Any], name: str, file: Path) -> dict[str, int]:
    counts = noted(result, name, dict, file) or {}
    return {key: noted(counts, key, int, file) or 0 for key in counts}


def _scores(result: Mapping[str, Any], side: str, file: Path) -> dict[str, Any]:
    """Metrics of a side, the interval of the one that has one, and the counts behind them."""
    scores: dict[str, Any] = {}
    for name, value in (noted(result, side, dict, file) or {}).items():
        if name.endswith(_INTERVAL):
            low, high = value if isinstance(value, list) and len(value) == 2 else (None, None)
            bounds = {"low": low, "high": high}
            scores[name] = [noted(bounds, bound, float, file) for bound in bounds]
        elif name == _BY_TARGET:
            by_target = noted(result[side], name, dict, file) or {}
            scores[name] = {target: _scores(by_target, target, file) for target in by_target}
        elif not name.endswith(_OF_MEMBERS):
            scores[name] = noted({name: value}, name, float, file)
    return scores


def _score_facts(side: str, scores: Mapping[str, Any], task: str) -> list[str]:
    """A line on all targets together, and one on each of several. Of errors in different units there is no mean."""
    by_target = scores.get(_BY_TARGET) or {}
    if len(by_target) < 2:
        return [_score_fact(side, scores)]
    of_all = [_score_fact(side, scores)] if task == "classification" else []
    shown = [_score_fact(side, by_target[name], f"{name}: ") for name in list(by_target)[:_SHOWN_TARGETS]]
    more = len(by_target) - len(shown)
    return of_all + shown + ([fact(side, f"and {plural(more, 'more target')}")] if more else [])


def _score_fact(side: str, scores: Mapping[str, Any], name: str = "") -> str:
    """Such as `test  roc_auc 0.91 (95% 0.87 to 0.95), average_precision 0.88; 204 molecules`."""
    metrics = [name for name in scores if not name.endswith(_INTERVAL) and name not in (*_COUNTS, _BY_TARGET)]
    words = [f"{name} {number(scores[name])}" + _interval(scores.get(name + _INTERVAL)) for name in metrics]
    targets, counted = scores.get("targets") or 1, scores.get("targets_counted")
    over = f" over {counted} of {targets} targets" if targets > 1 else ""
    molecules = scores.get("molecules")
    of = "" if molecules is None else f"; {molecules:,} molecules"
    return fact(side, name + ", ".join(words) + over + of)


def _interval(bounds: list[float | None] | None) -> str:
    if bounds is None or None in bounds:
        return ""
    return f" (95% {number(bounds[0])} to {number(bounds[1])})"


def _targets(targets: list[str]) -> str:
    more = len(targets) - _SHOWN_TARGETS
    return ", ".join(targets[:_SHOWN_TARGETS]) + (f" and {more} more" if more > 0 else "")


def _sides(figures: Mapping[str, Any]) -> str:
    sides = {"train": "training", "validation": "validation", "test": "test"}
    rows, left_out = figures["rows"], figures["left_out"]
    words = ", ".join(f"{rows[side]:,} for {name}" for side, name in sides.items() if side in rows)
    out = rejects_in_words(left_out)
    return (words or "rows not noted") + (f"; left out: {out}" if out else "")


def _fit(figures: Mapping[str, Any]) -> str:
    what = {"full": "encoder and head", "frozen": "the head alone, on a frozen encoder"}
    members = figures["members"]
    how = f"{what.get(figures['mode'] or '', 'how is not noted')}, readout {figures['readout']}; "
    return how + (
        f"an ensemble of {members}" if members > 1 else "one member, so its predictions come without a deviation"
    )
