"""Start a run again when it fails: from its last checkpoint, with pauses, and not for ever."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hmoe_ds.training import exit_codes
from hmoe_ds.training.best_effort import say
from hmoe_ds.training.outcome import Outcome, forget_outcome, read_outcome
from hmoe_ds.training.run_folder import newest_step

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 300.0
# After these a new start would end the same way, or is not ours to make.
FINAL = {exit_codes.DONE, exit_codes.DIVERGED, exit_codes.REQUEUE}


def supervise(attempt: Callable[[], int], pause: Callable[[float], bool], out: Path, restarts: int) -> int:
    """Make attempts until the run is done, or it makes no sense to go on.

    It ends after `restarts` restarts in a row between which no checkpoint was saved, or after two of these with the
    same error, unless it is one that may pass.

    Args:
        attempt: starts the run and waits for its end; -> its exit code.
        pause: waits so many seconds; -> False when there is to be no other attempt.
        out: the run's folder.
        restarts: how often in a row.

    Returns:
        The exit code of the last attempt.
    """
    failures, step, error, first = 0, _newest_step(out, 0), None, True
    while True:
        code, outcome = _attempted(attempt, out)
        if code == exit_codes.DONE and not outcome.done:
            code = exit_codes.FAILED  # the launcher does not know better
        if code in FINAL or (code == exit_codes.USAGE and first):
            return code
        first = False  # what was refused now was not before: a disk that filled, a machine with less memory
        step_before, error_before = step, error
        step, error = _newest_step(out, step), outcome.error
        if step > step_before:
            failures = 0
        elif error is not None and error == error_before:
            _say(f"the run failed twice at the same place with the same error, so it is not started again: {error}")
            return code
        failures += 1
        if failures > restarts:
            _say(f"the run failed {failures} times in a row without a new checkpoint, so it is not started again")
            return code
        if not pause(0):
            return code
        seconds = min(FIRST_PAUSE_SECONDS * 2.0 ** (failures - 1), LONGEST_PAUSE_SECONDS)
        _say(
            f"the run ended with exit code {code}; it is started again in {seconds:g} s, from step {step} "
            f"(restart {failures} of {restarts})"
        )
        if not pause(seconds):
            return code


def _attempted(attempt: Callable[[], int], out: Path) -> tuple[int, Outcome]:
    """-> the exit code of an attempt, and what its ranks said of it. One whose outcome could not be told fails."""
    try:
        forget_outcome(out)
    except OSError as error:
        _say(f"{error}: no rank is started")
        return exit_codes.FAILED, Outcome()
    return attempt(), read_outcome(out)


def _newest_step(out: Path, before: int) -> int:
    """The step of the newest checkpoint; where the folder cannot be read now, what it was `before`."""
    try:
        return newest_step(out)
    except OSError:
        return before


def _say(message: str) -> None:
    say(f"hmoe pretrain: {message}")
