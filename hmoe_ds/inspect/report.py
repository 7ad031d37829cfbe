"""What an inspection found, as text and as figures, and how the text writes its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

_LABEL = 12


class Report(NamedTuple):
    """What an inspection found.

    Attributes:
        kind: what the folder is.
        text: for a person, one fact per line.
        figures: the same for a program; values that JSON knows.
        problems: what is damaged or missing, one line each.
    """

    kind: str
    text: str
    figures: dict[str, Any]
    problems: list[str]


def fact(label: str, *parts: str) -> str:
    """A line of the text; parts that are empty are left out."""
    return f"{label:<{_LABEL}}" + ", ".join(part for part in parts if part)


def files_fact(number: int, problems: Sequence[str], read: bool) -> str:
    """The line about files with recorded sizes and checksums."""
    found = "have the content" if read else "have the size"
    whole = f"all {number:,} {found} they were written with"
    return fact("files", "; ".join([*(problems or [whole]), *([] if read else ["--verify reads them"])]))


def number(value: float | None) -> str:
    """A loss or a score, to three digits; None is one that was not finite."""
    if value is None:
        return "not finite"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".removesuffix(".")


def plural(count: int, thing: str) -> str:
    """Such as 1 rank, 2 ranks."""
    return f"{count:,} {thing}" + ("" if count == 1 else "s")
