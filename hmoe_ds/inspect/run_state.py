"""How a run is: it is going on, or how it ended."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from hmoe_ds.training.lock import COMMAND_LOCK, LOCK, holder
from hmoe_ds.training.outcome import OUTCOME, read_outcome

GOING_ON, STARTING = "going on", "starting"
DONE, STOPPED, FAILED, INTERRUPTED = "done", "stopped", "failed", "interrupted"
# A process holds the run's folder.
HELD = (GOING_ON, STARTING)


class RunState(NamedTuple):
    """How a run is.

    Attributes:
        name: one of the constants of this module.
        detail: whose process holds it, why it failed.
    """

    name: str
    detail: str


def state_of(out: Path) -> RunState:
    """The state of the run in the folder `out`, as far as locks and the last outcome tell."""
    rank, command = holder(out, LOCK), holder(out, COMMAND_LOCK)
    if rank is not None:
        return RunState(GOING_ON, rank)
    outcome = read_outcome(out)
    if command is not None and not outcome.done:
        return RunState(STARTING, command)
    if outcome.done:
        return RunState(DONE, "")
    if outcome.stopped:
        return RunState(STOPPED, "it was asked to, and has saved")
    if outcome.error is not None:
        return RunState(FAILED, " ".join(str(outcome.error).split()))
    if (out / OUTCOME).exists():
        return RunState(FAILED, "for a reason of the file system or the network, which may have passed; see its output")
    return RunState(INTERRUPTED, "nothing trains it now, and nothing says how it ended: it was killed, or its machine")
