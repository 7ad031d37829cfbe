"""What only tells of a run must not end it: where its file or its terminal fails, that is said, and the run goes on."""

from __future__ import annotations

import contextlib
import sys
from types import TracebackType
from typing import TextIO


class BestEffort:
    """A context in which an OSError passes. It is said once, and again only if it has worked in between.

    Args:
        what: is written in it, in words.
    """

    def __init__(self, what: str) -> None:
        self._what, self._fails = what, False

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> bool:
        if error is None:
            self._fails = False
        if not isinstance(error, OSError):
            return False
        if not self._fails:
            say(f"{self._what} cannot be written ({error}); the training goes on")
        self._fails = True
        return True


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line (default: on standard error), unless that is a file on a full disk, or a terminal that has gone."""
    with contextlib.suppress(OSError):
        print(text, file=stream or sys.stderr, flush=True)
