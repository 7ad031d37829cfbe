"""One thing that was looked at."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Literal

_WIDTH, _INDENT = 120, 28


@dataclass(frozen=True)
class Finding:
    """What was found, and what it means for pretraining here.

    Args:
        subject: what was looked at, in a word or two.
        level: "ok"; "note": a run works, but worse than it could, or not on several machines; "problem": it does not.
        found: what is there.
        expected: what should be there, unless that is plain.
        mend: what to do about it.
    """

    subject: str
    level: Literal["ok", "note", "problem"]
    found: str
    expected: str = ""
    mend: str = ""

    def __str__(self) -> str:
        expected = f"; expected: {self.expected}" if self.expected else ""
        head = f"{self.level:<9}{self.subject:<{_INDENT - 9}}"
        texts = [head + self.found + expected, *([" " * _INDENT + "mend: " + self.mend] if self.mend else [])]
        return "\n".join(
            textwrap.fill(text, _WIDTH, subsequent_indent=" " * _INDENT, break_long_words=False, break_on_hyphens=False)
            for text in texts
        )


def ok(subject: str, found: str) -> Finding:
    """Nothing to mend."""
    return Finding(subject, "ok", found)


def note(subject: str, found: str, expected: str, mend: str) -> Finding:
    """A run works nevertheless."""
    return Finding(subject, "note", found, expected, mend)


def problem(subject: str, found: str, expected: str, mend: str) -> Finding:
    """Pretraining does not work."""
    return Finding(subject, "problem", found, expected, mend)
