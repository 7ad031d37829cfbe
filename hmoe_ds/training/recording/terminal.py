"""What a person sees of a run: one line that says how far it is, a table at each validation, warnings."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from typing import TextIO

from data_pipeline.quantities import duration
from hmoe_ds.training.best_effort import BestEffort

_VALIDATION = "validation_"
_CLEAR_LINE = "\r\x1b[K"


class Terminal:
    """Prints to `stream` (default: standard output).

    On a terminal the line of a step takes the place of the one before; elsewhere each is a line of its own. If nothing
    can be printed any more, as on a terminal that has gone, the training goes on.

    Args:
        steps: of the whole run.
        stream: where to print.
    """

    def __init__(self, steps: int, stream: TextIO | None = None) -> None:
        self._steps, self._stream = steps, stream or sys.stdout
        self._effort = BestEffort("standard output")
        self._first: tuple[int, float] | None = None
        self._open = False

    def step(self, step: int, loss: float, molecules_per_second: float) -> None:
        """Say that `step` steps are done; the time left is told from the second call on."""
        now = time.monotonic()
        if self._first is None:
            self._first = step, now
        first, began = self._first
        left = ""
        if first < step < self._steps:
            left = f"  {duration((self._steps - step) * (now - began) / (step - first))} left"
        line = f"step {step}/{self._steps}  loss {loss:.4f}  {molecules_per_second:,.0f} molecules/s{left}"
        if self._stream.isatty():
            self._print(_CLEAR_LINE + line, end="")
            self._open = True
        else:
            self._print(line)

    def validation(self, step: int, figures: Mapping[str, float], before: Mapping[str, float]) -> None:
        """A table of what a validation, or a probe, measured after a step, and of the values before."""
        self.close()
        kind = "validation" if any(name.startswith(_VALIDATION) for name in figures) else "probe"
        title = f"{kind} after step {step}"
        rows = [(_title(name), _shown(value), _shown(before.get(name))) for name, value in figures.items()]
        width = max(len(title), *(len(name) + 2 for name, *_ in rows))
        lines = [f"{title:<{width}}  {'now':>10}  {'before' if before else '':>10}"]
        lines += [f"  {name:<{width - 2}}  {value:>10}  {was:>10}" for name, value, was in rows]
        self._print("\n".join(line.rstrip() for line in lines))

    def warn(self, step: int, text: str) -> None:
        """Say what is wrong at a step."""
        self.close()
        self._print(f"warning at step {step}: {text}")

    def close(self) -> None:
        """End the line that the next one would have replaced."""
        if self._open:
            self._print("")
        self._open = False

    def _print(self, text: str, end: str = "\n") -> None:
        with self._effort:
            print(text, end=end, file=self._stream, flush=True)


def _title(name: str) -> str:
    return name.removeprefix(_VALIDATION).replace("_", " ")


def _shown(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if math.isfinite(value) and abs(value) >= 100 else f"{value:.4f}"
