"""Progress of a command, on standard error."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


class Progress:
    """A bar per stage on a terminal; a plain line at the end of each stage when piped."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._stage = ""
        self._done = 0

    def report(self, stage: str, done: int, total: int | None) -> None:
        """Stage `stage` has done `done` of `total` (None: unknown) units."""
        if stage != self._stage:
            self._finish()
            self._stage = stage
            self._bar = tqdm(desc=stage, total=total, disable=not sys.stderr.isatty(), unit="")
        self._done = done
        if self._bar is not None:
            self._bar.update(done - self._bar.n)

    def _finish(self) -> None:
        if self._bar is not None:
            self._bar.close()
            if not sys.stderr.isatty():
                print(f"{self._stage}: {self._done} done", file=sys.stderr)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._finish()
