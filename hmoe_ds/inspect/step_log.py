"""The last lines of a run's `metrics.jsonl`, without reading all of it into memory."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from typing import NamedTuple

from data_pipeline.errors import PipelineError
from hmoe_ds.inspect.noted import numbers
from hmoe_ds.run_files import METRICS, whole_lines

Line = dict[str, float | None]

_RECENT = 20
_VALIDATION = b'"validation_loss"'


class StepLog(NamedTuple):
    """What a run logged last.

    Attributes:
        recent: the last lines, oldest first; figures that were not finite are None.
        validation: the last line with a validation in it.
    """

    recent: list[Line]
    validation: Line | None


def read_step_log(out: Path) -> StepLog:
    """The log of the run in the folder `out`; one that has logged nothing yet has no lines.

    Raises:
        PipelineError: a line is no record of a step.
    """
    recent, validation = deque[bytes](maxlen=_RECENT), None
    path = out / METRICS
    for line in whole_lines(path):
        recent.append(line)
        validation = line if _VALIDATION in line else validation
    return StepLog([_parsed(line, path) for line in recent], None if validation is None else _parsed(validation, path))


def _parsed(line: bytes, path: Path) -> Line:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise PipelineError(f"{path} is damaged: {line[:80]!r} is no record of a step ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("step"), int):
        raise PipelineError(f"{path} is damaged: {line[:80]!r} is no record of a step")
    return numbers(content, path)
