"""What is due after an optimizer step, beside the next one."""

from __future__ import annotations

from typing import NamedTuple

from hmoe_ds.config import LoopConfig


class Due(NamedTuple):
    """What is to be done after a step.

    Attributes:
        line: a line of metrics.
        validation: a validation.
        probe: a measurement of the probes.
        checkpoint: a checkpoint.
    """

    line: bool
    validation: bool
    probe: bool
    checkpoint: bool


def due_after(step: int, run: LoopConfig, probe_every: int) -> Due:
    """What is due after `step` steps: all of it after the last, a line also after the first and with what it shows."""
    validation, probe, checkpoint = (
        step == run.steps or (every > 0 and step % every == 0)
        for every in (run.validate_every, probe_every, run.checkpoint_every)
    )
    line = step in (1, run.steps) or step % run.log_every == 0 or validation or probe
    return Due(line, validation, probe, checkpoint)
