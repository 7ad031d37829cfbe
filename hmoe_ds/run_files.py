"""Files in a run's folder that others read: their names, and their lines while they are being written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

CONFIG = "config.yaml"
RECORD = "run.json"
METRICS = "metrics.jsonl"
LOAD = "load.jsonl"
ALLOCATION = "allocation.jsonl"
# There only if steps changed nothing (`training/skipped.py`).
SKIPPED = "skipped.jsonl"


def whole_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, if it is there; a last one without its end is being written, or never will be."""
    if path.is_file():
        with path.open("rb") as file:
            yield from (line for line in file if line.endswith(b"\n"))
