"""How a start of a run ended, as its ranks wrote it down in the run's folder: launchers' exit codes are not enough.

DeepSpeed's runner ends with 0 also when its child was killed, and a rank that fails takes others with it.
"""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import NamedTuple

from data_pipeline.redact import redacted

OUTCOME = "outcome.json"
# Where a rank learns that another one is gone.
_COMMUNICATION = ("/torch/distributed/", "/deepspeed/comm/")


class Outcome(NamedTuple):
    """How a start ended.

    Attributes:
        done: all steps of the run are done.
        stopped: it was asked to stop, and has saved.
        error: of the first rank that failed, if one could still say why, and if it would fail likewise again.
    """

    done: bool = False
    stopped: bool = False
    error: str | None = None


def note_done(out: Path) -> None:
    """The run in the folder `out` has done all its steps."""
    _note(out, Outcome(done=True))


def note_stopped(out: Path) -> None:
    """The run was asked to stop, and has saved."""
    _note(out, Outcome(stopped=True))


def note_failure(out: Path, error: Exception) -> None:
    """A rank fails, with `error`. The first one counts, and not those that fail because another one is gone.

    What the file system or the network refuse may pass, so such an error is not kept.
    """
    place = traceback.extract_tb(error.__traceback__)[-1].filename.replace("\\", "/")
    if out.is_dir() and not any(part in place for part in _COMMUNICATION):
        passing = isinstance(error, OSError) or isinstance(error.__cause__, OSError)
        _note(out, Outcome(error=None if passing else redacted(f"{type(error).__name__}: {error}")))


def read_outcome(out: Path) -> Outcome:
    """How the last start ended, as far as it could say."""
    try:
        return Outcome(**json.loads((out / OUTCOME).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return Outcome()


def forget_outcome(out: Path) -> None:
    """The run starts anew, or again."""
    (out / OUTCOME).unlink(missing_ok=True)


def _note(out: Path, outcome: Outcome) -> None:
    try:
        with (out / OUTCOME).open("x", encoding="utf-8") as file:
            json.dump(outcome._asdict(), file)
    except OSError:  # another rank was first, or the disk is what fails: the error is printed, too
        return
