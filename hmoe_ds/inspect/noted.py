"""What records note: files may come from anyone, so a value is of the type that is expected, or it is named."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from data_pipeline.errors import UsageError

Value = TypeVar("Value")


class Source(NamedTuple):
    """A file of molecules that a dataset was made of.

    Attributes:
        name: of the file.
        rows: in it.
        licence: its terms, as far as they are known.
    """

    name: str
    rows: int
    licence: str | None


class Notes(NamedTuple):
    """What a checkpoint or an export notes of the training; older ones note less.

    Attributes:
        step: steps done.
        molecules: of the training split.
        standardize: whether they were in their standard form.
        sources: of the dataset.
        validation: what the validation after the step measured; {} when there was none.
    """

    step: int | None
    molecules: int | None
    standardize: bool | None
    sources: list[Source]
    validation: dict[str, float]


def noted(content: Mapping[str, Any], name: str, kind: type[Value], path: Path) -> Value | None:
    """A value of a record, None when it is not noted.

    Raises:
        UsageError: it is of another type than `kind`.
    """
    value = content.get(name)
    if value is None:
        return None
    if not isinstance(value, (int, float) if kind is float else kind) or (isinstance(value, bool) and kind is not bool):
        raise UsageError(f"{path}: {name} is {str(value)[:80]!r}, expected {kind.__name__}: do not use this folder")
    return value  # type: ignore[return-value]  # an int for a float


def numbers(content: Mapping[str, Any], path: Path) -> dict[str, float | None]:
    """The numbers of a record of measurements. Raises UsageError as `noted`."""
    return {name: noted(content, name, float, path) for name in content}


def read_notes(content: Mapping[str, Any], path: Path) -> Notes:
    """What the record of a checkpoint, or `training` in `config.json`, notes.

    Args:
        content: of the record.
        path: where it lies, for the message.

    Raises:
        UsageError: a value is of another type.
    """
    sources = [_source(each, path) for each in noted(content, "sources", list, path) or []]
    measured = numbers(noted(content, "validation", dict, path) or {}, path)
    return Notes(
        noted(content, "step", int, path),
        noted(content, "molecules", int, path),
        noted(content, "standardize", bool, path),
        sources,
        {name: value for name, value in measured.items() if value is not None},
    )


def _source(content: Any, path: Path) -> Source:
    if not isinstance(content, dict):
        raise UsageError(f"{path}: a source is {str(content)[:80]!r}, expected its name, rows and licence")
    name, rows = noted(content, "name", str, path), noted(content, "rows", int, path)
    return Source(name or "without a name", rows or 0, noted(content, "licence", str, path))
