"""Which kind of folder a path is, told from the files in it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from data_pipeline.errors import UsageError
from data_pipeline.manifest import MANIFEST_FILE
from hmoe_ds.downstream.predictor_record import DESCRIPTION
from hmoe_ds.model.checkpoint_record import LIST_FILE, RECORD_FILE
from hmoe_ds.model.description import CONFIG, WEIGHTS
from hmoe_ds.run_files import RECORD
from hmoe_ds.training.run_folder import LATEST, is_tag

_SHOWN_NAMES = 6


class _Mark(NamedTuple):
    """By what a kind is told: any of these files."""

    files: tuple[str, ...]
    words: str


_MARKS = {
    "dataset": _Mark((MANIFEST_FILE,), "a dataset of `hmoe prepare`"),
    "run": _Mark((RECORD,), "a run of `hmoe pretrain`"),
    "checkpoint": _Mark((RECORD_FILE, LIST_FILE, LATEST), "a checkpoint"),
    "predictor": _Mark((DESCRIPTION,), "a predictor of `hmoe finetune`"),
    "model": _Mark((CONFIG, WEIGHTS), "a model of `hmoe export`"),
}


def kind_of(path: Path) -> str:
    """`dataset`, `run`, `checkpoint`, `model` or `predictor`.

    Raises:
        UsageError: it is none of them.
    """
    kind = _kind(path)
    if kind is None:
        raise UsageError(_not_known(path))
    return kind


def _kind(path: Path) -> str | None:
    marked = (kind for kind, mark in _MARKS.items() if any((path / file).is_file() for file in mark.files))
    # A checkpoint that has lost all its records still has its name.
    return next(marked, "checkpoint" if path.is_dir() and is_tag(path.name) else None)


def _not_known(path: Path) -> str:
    """What is there instead, and what was expected."""
    if path.is_file():
        kind = _kind(path.parent)
        if kind is not None:
            return f"{path} is a file in {_MARKS[kind].words}: give its folder, {path.parent}"
        found = "is a file"
    elif path.is_dir():
        names = sorted(each.name for each in path.iterdir())
        inside = [f"{name} ({_MARKS[kind].words})" for name in names if (kind := _kind(path / name)) is not None]
        if inside:
            return f"{path} holds {_some(inside)}: give one of these folders"
        found = f"is a folder with {_some(names)}" if names else "is an empty folder"
    else:
        found = "does not exist"
    expected = ", ".join(f"{mark.words} ({mark.files[0]})" for mark in _MARKS.values())
    return f"{path} {found}; expected the folder of one of: {expected}"


def _some(words: list[str]) -> str:
    more = len(words) - _SHOWN_NAMES
    return ", ".join(words[:_SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")
